"""What the raw reports and rows were measured on: the card and the versions.

A folder of ``benchmarks/results`` or ``benchmarks/profiles`` holds what one card measured with one set of versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.compare.sources import Found, read
from pipeline.record.own_code import BESIDE_A_FIGURE, code_hash

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PROFILES = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "profiles"
NAMES = {"tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
UNRECORDED: dict[str, dict[str, Any]] = {
    # Of the first rows of benchmarks.drop_in, which have torch_tensorrt's version and the card's name alone.
    # Source: what that distribution of Torch-TensorRT requires, and what the card's other reports say.
    "2.14.0": {
        "flavour": "tensorrt_rtx",
        "tensorrt": "1.6.1.120",
        "compute_capability": "9.0",
        "supported_by_vendor": False,
    }
}


class Stack(NamedTuple):
    """In an order in which newer versions are greater."""

    tensorrt: tuple[int, ...]
    torch: tuple[int, ...]
    gpu: str
    flavour: str

    @property
    def title(self) -> str:
        return f"{NAMES[self.flavour]} {_dotted(self.tensorrt)}, torch {_dotted(self.torch)}, {self.gpu}"


@dataclass
class Measured:
    """Everything that was measured on one stack."""

    stack: Stack
    environment: Mapping[str, Any]
    reports: list[Found] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    """Of reports and of raw rows."""

    @property
    def is_of_this_code(self) -> bool:
        return any(not is_older(each.report["environment"]) for each in self.reports if each.report["status"] == "ok")

    def order(self) -> tuple[Any, ...]:
        """Greatest is the stack of which a report is of this code, then that of newer versions, then that of the card
        that measured more."""
        versions = self.stack.tensorrt, self.stack.torch
        return self.is_of_this_code, *versions, len(self.reports), self.stack


def stack_of(environment: Mapping[str, Any]) -> Stack:
    version = str(environment["torch"]).partition("+")[0]
    return Stack(_numbers(environment["tensorrt"]), _numbers(version), environment["gpu"], environment["flavour"])


def caption(environment: Mapping[str, Any]) -> str:
    """The card, what its vendor says of it, and the versions: what stands over each table."""
    name = NAMES.get(environment.get("flavour") or "", "TensorRT")
    card = environment.get("gpu") or "no GPU"
    if capability := environment.get("compute_capability"):
        card += f", compute capability {capability}"
    if environment.get("supported_by_vendor") is False:
        card += f" (officially not supported by the vendor for {name})"
    return f"{card}, {versions(environment)}"


def is_older(environment: Mapping[str, Any] | None) -> bool:
    """Whether other code than this made, judged or timed it; what does not say is older than the code that does."""
    return (environment or {}).get("code") != this_code()


@cache
def this_code() -> str:
    return code_hash(beside=BESIDE_A_FIGURE)


def aged(environment: Mapping[str, Any] | None) -> str:
    """A sentence for behind a caption where what is below is of older code, else nothing."""
    return " Measured by older code than this." if is_older(environment) else ""


def versions(environment: Mapping[str, Any]) -> str:
    name = NAMES.get(environment.get("flavour") or "", "TensorRT")
    return f"{name} {environment.get('tensorrt')}, torch {str(environment.get('torch')).partition('+')[0]}"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file of ``benchmarks/profiles``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def environment_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What ``rows`` were measured on, by the first that says it; empty where none does."""
    for row in rows:
        if "environment" in row:
            return dict(row["environment"])
        if "torch_tensorrt" in row:
            return {**UNRECORDED[row["torch_tensorrt"]], "gpu": row["gpu"], "torch": row["torch"]}
    return {}


def measured() -> list[Measured]:
    """By stack, see :meth:`Measured.order`; raises ``ValueError`` where the reports of one folder are of several."""
    found: dict[Stack, Measured] = {}
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        reports, unreadable = read([str(folder)], "", lambda report: report)
        executed = {stack_of(each.report["environment"]): each for each in reports if each.report["status"] == "ok"}
        if len(executed) != 1 or unreadable:
            raise ValueError(f"{folder.name}: {unreadable or sorted(executed)}: is to hold reports of one stack")
        ((stack, one),) = executed.items()
        held = found.setdefault(stack, Measured(stack, one.report["environment"]))
        held.reports += reports
        held.folders.append(folder)
    for folder in sorted(path for path in PROFILES.iterdir() if path.is_dir()):
        environments = [environment_of(rows_of(path)) for path in sorted(folder.glob("*.jsonl"))]
        profiles = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
        environments += [profile["environment"] for profile in profiles if "environment" in profile]
        environment = next((each for each in environments if each), None)
        if environment is None:
            raise ValueError(f"{folder.name}: no row says what it was measured on")
        stack = stack_of(environment)
        found.setdefault(stack, Measured(stack, environment)).folders.append(folder)
    return sorted(found.values(), key=Measured.order, reverse=True)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
