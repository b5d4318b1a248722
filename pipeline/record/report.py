"""report.json (schema 3, docs/report.schema.json): written sealed, and read, in that form, of older schemas as well."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.host.files import write_text
from pipeline.host.plain_json import to_json
from pipeline.record import markdown

if TYPE_CHECKING:
    from passes.graph.records import CallRecord

SCHEMA = 3
READABLE = (1, 2, SCHEMA)

ENGINE, GRAPH, NOT_VERIFIED = "engine", "graph", "no"
"""Answers of :func:`verified_by`; the others are names of rivals."""


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write report.json, sealed: its ``sha256`` is that of everything else in it."""
    write_json(path, report | {"sha256": _digest(to_json(report))})


def read_report(path: Path) -> dict[str, Any] | None:
    """The report in ``path``, :func:`upgraded`; None where there is none of a known schema, or none that can be
    read."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return upgraded(report) if isinstance(report, dict) and report.get("schema") in READABLE else None


def upgraded(report: dict[str, Any]) -> dict[str, Any]:
    """``report`` in the form of schema 3, so that readers know one form only; what schema 1 did not say stays unsaid.

    Schema 1 left out what was not there (it is null now), had the second program's sections inside the first one's,
    and a case's yardsticks among its own numbers.  Schemas 1 and 2 called an answer the engine's, whatever gave it.
    """
    if report["schema"] == 1:
        report = _in_schema_2(report)
    return report if report["schema"] == SCHEMA else _in_schema_3(report)


def _in_schema_3(report: dict[str, Any]) -> dict[str, Any]:
    new = {**report, "schema": SCHEMA}
    if answer := (report.get("verify") or {}).get("answer"):
        renamed = {"candidate" if key == "engine" else key: value for key, value in answer.items()}
        new["verify"] = {**report["verify"], "answer": renamed}
    return new


def _in_schema_2(report: dict[str, Any]) -> dict[str, Any]:
    decode = {name: (report.get(name) or {}).get("decode") for name in ("attention", "engine")}
    new = {"unavailable": None, "mlflow": None, **report, "schema": 2}
    new["decode"] = decode if any(decode.values()) else None
    for name in decode:
        if new.get(name):
            new[name] = {key: value for key, value in new[name].items() if key != "decode"}
    if new.get("verify"):
        new["verify"] = _with_yardsticks(new["verify"])
        if new["verify"].get("outside"):
            new["verify"]["outside"] = _with_yardsticks(new["verify"]["outside"])
    return new


def _with_yardsticks(section: dict[str, Any]) -> dict[str, Any]:
    cases = []
    for case in section.get("cases") or ():
        yardsticks = {key: value for key, value in case.items() if key.startswith("pytorch")}
        rest = {key: value for key, value in case.items() if key not in yardsticks}
        cases.append({**rest, "yardsticks": yardsticks})
    return {**section, "cases": cases}


def is_sealed(report: dict[str, Any]) -> bool:
    """Whether a report that was read is as it was written; true also of older ones, which have no ``sha256``."""
    return "sha256" not in report or report["sha256"] == _digest(report)


def _digest(report: dict[str, Any]) -> str:
    return sha256_of_json({key: value for key, value in report.items() if key != "sha256"})


def sha256_of_json(content: Any) -> str:
    """sha256, in hex, of ``content`` as JSON with its keys in order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verified_by(report: Mapping[str, Any]) -> str:
    """What passed the run's verification: ``engine``, which was executed; ``graph``, which the engine was made from,
    in PyTorch, where no GPU could execute the engine; the name of a rival; or ``no``, where nothing did."""
    verify = report.get("verify") or {}
    passed = verify.get("passed") is True and (report.get("failure") or {}).get("kind") != "accuracy"
    return str(verify.get("executed", NOT_VERIFIED)) if passed else NOT_VERIFIED


def times_count(report: Mapping[str, Any]) -> bool:
    """Whether what the run timed is what passed its verification; numbers of anything else are not shown."""
    return verified_by(report) not in (NOT_VERIFIED, GRAPH)


def worst_case(verify: dict[str, Any]) -> dict[str, Any]:
    """The case of a report's ``verify`` section that came closest to its tolerance, or furthest beyond it."""
    worst: dict[str, Any] = max(verify["cases"], key=error_share)
    return worst


def relative_error(report: Mapping[str, Any]) -> float | None:
    """That of the :func:`worst_case`, against PyTorch in a precision wider than the run's; None where there is none, or
    the answer was not finite."""
    cases = [case for case in (report.get("verify") or {}).get("cases") or () if case.get("tolerance") is not None]
    return worst_case({"cases": cases})["relative_error"] if cases else None


def engine_bytes(report: Mapping[str, Any]) -> int | None:
    """Bytes of the run's engines, both of them with a KV cache; None where none was built."""
    sections = (report.get("engine"), (report.get("decode") or {}).get("engine"))
    sizes = [section["bytes"] for section in sections if section and section.get("bytes")]
    return sum(sizes) if sizes else None


def error_share(case: dict[str, Any]) -> float:
    """Relative error of a case over what is allowed; infinite where there was no finite answer (null on disk)."""
    error, allowed = case["relative_error"], case["tolerance"]
    if error is None or allowed is None or not math.isfinite(error) or not allowed > 0:
        return math.inf
    return float(error / allowed)


def write_json(path: Path, content: Any) -> None:
    """Strict JSON: NaN and infinities become null.  Whole or not at all: a reader never sees half a file."""
    write_text(path, strict_json(content) + "\n")


def strict_json(content: Any) -> str:
    """``content`` as strict JSON."""
    return json.dumps(to_json(content), indent=2, allow_nan=False, ensure_ascii=False)


def calls_table(calls: Iterable[CallRecord]) -> str:
    """The attention calls as a Markdown table, one row a call."""
    columns = ("index", "name", "mask", "proof", "depends_on", "action", "native_gqa", "reason")
    lines = ([getattr(call, column) for column in columns] for call in calls)
    shown = ([", ".join(each) if isinstance(each, tuple) else each for each in line] for line in lines)
    return markdown.table(columns, shown)
