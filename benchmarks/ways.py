"""The kept reports as rows: what was to be done, how it was done, and the reports of every process that did it so."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any, NamedTuple

from passes.precision import FEW_BITS
from pipeline.compare.ratios import Ratio, ratio
from pipeline.compare.rows import Figure
from pipeline.compare.sources import Found
from pipeline.config.choices import STRATEGIES
from pipeline.record.report import times_count

CACHES = {"none": "no cache", "dynamic": "DynamicCache", "static": "static cache", "in_engine": "cache in the engine"}
RIVALS = {"eager": "PyTorch eager", "torch_compile": "torch.compile", "plugin": "attention plugin"}
BEST_MODE = "reduce-overhead"
"""Of torch.compile: with CUDA graphs; every row that says nothing else has it."""


class Task(NamedTuple):
    """What was to be done.  Only times of one task are compared."""

    kind: str
    """``generate`` or ``prefill``."""
    model: str
    weights: str
    batch: int
    input_length: int
    output_length: int
    """0 of a prompt alone."""

    @property
    def size(self) -> str:
        if not self.output_length:
            return f"{self.batch} × {self.input_length} tokens"
        return f"{self.input_length} tokens in, {self.output_length} out, batch {self.batch}"


class Way(NamedTuple):
    """How it was done.  Reports of one task and one way are of several processes, or builds, of one measurement."""

    backend: str
    mode: str
    cudnn: bool
    strategy: str
    """Empty where it has no part, as in a rival's run."""
    options: tuple[str, ...]
    """What else was asked for, and is not what one gets without asking."""
    cache: str
    lengths: str
    """``one``, or ``every`` length up to the longest."""
    precision: str

    @property
    def is_ours(self) -> bool:
        return self.backend == "tensorrt"

    def label(self, kind: str, among: Collection[Way] = ()) -> str:
        """What a row is called in Markdown, in a table of ways ``among``: how it differs from the others."""
        ours = self.is_ours
        parts = [f"`{self.strategy}`" if ours else RIVALS[self.backend]]
        if self.mode not in ("", BEST_MODE):
            parts[0] += f" ({self.mode})"
        if kind == "generate" and self.backend != "plugin":
            parts.append(CACHES[self.cache])
        if kind == "prefill" and ours:
            parts += [f"{self.lengths} length", *([CACHES[self.cache]] if self.cache != "none" else [])]
        if len({way.precision for way in among}) > 1:
            parts.append(self.precision)
        if any(way == self._replace(cudnn=not self.cudnn) for way in among):
            parts.append("cuDNN's attention" if self.cudnn else "without cuDNN's attention")
        return ", ".join([*parts, *(f"`{option}`" for option in self.options)])


@dataclass(frozen=True)
class Row:
    """One way of doing one task."""

    task: Task
    way: Way
    found: tuple[Found, ...]
    """Its reports: those that were timed, or where there is none those that say why."""

    @property
    def report(self) -> dict[str, Any]:
        return self.found[0].report

    @cached_property
    def figures(self) -> list[Figure]:
        """Device time of each process; empty where nothing was timed."""
        summaries = [measured(each.report, self.task) for each in self.found]
        return [Figure(s["device_ms"]["median"], *s["device_ms"]["ci95"]) for s in summaries if s]

    @property
    def time(self) -> Figure | None:
        """ms: of one process its median and 95 % interval, of several the median of medians and what holds all."""
        if not self.figures:
            return None
        return Figure(
            median(each.median for each in self.figures),
            min(each.low for each in self.figures),
            max(each.high for each in self.figures),
        )

    def median(self, *path: str, of: str = "benchmark") -> float | None:
        """Over all processes, the median of the number at ``path`` in section ``of``; None where none has it."""
        found = [value for each in self.found if (value := at(each.report, of, *path)) is not None]
        return median(found) if found else None

    @property
    def taints(self) -> list[str]:
        """Why to doubt it, in words that repeat from row to row."""
        summaries = [measured(each.report, self.task) or {} for each in self.found]
        said = {text for summary in summaries for text in summary.get("tainted") or ()}
        words = {
            "launch-bound": any(summary.get("launch_bound") for summary in summaries),
            "power-limited": any("power" in text for text in said),
            "times drifted": any("drifted" in text for text in said),
            "warm-up did not settle": any("did not settle" in text for text in said),
        }
        known = ("power", "drifted", "did not settle")
        return [word for word, holds in words.items() if holds] + sorted(
            text for text in said if not any(each in text for each in known)
        )


def at(report: Mapping[str, Any], *path: str) -> Any:
    """What stands at ``path``; None where a section on the way is missing or null."""
    value: Any = report
    for name in path:
        value = (value or {}).get(name)
    return value


def measured(report: Mapping[str, Any], task: Task) -> dict[str, Any] | None:
    """What ``report`` measured of ``task``; None where nothing was timed, or nothing that was verified."""
    if report["status"] != "ok" or not times_count(report):
        return None
    benchmark = report["benchmark"] or {}
    entries = [benchmark.get(task.kind), *((benchmark.get("prefill_shapes") or []) * (task.kind == "prefill"))]
    size = (task.batch, task.input_length, task.output_length)
    sizes = (
        (entry, (entry["batch"], entry["input_length"], entry.get("output_length") or 0)) for entry in entries if entry
    )
    return next((entry for entry, found in sizes if found == size), None)


def is_generation(report: Mapping[str, Any]) -> bool:
    return bool(report["config"]["benchmark"].get("generate"))


def tasks_of(report: Mapping[str, Any]) -> list[Task]:
    """What a run was about: a generation, or its prompts."""
    config = report["config"]
    asked, who = config["benchmark"], (config["model"]["name"], config["model"]["weights"])
    if generate := asked.get("generate"):
        return [Task("generate", *who, generate["batch"], generate["input_length"], generate["output_length"])]
    return [Task("prefill", *who, shape["batch"], shape["input_length"], 0) for shape in asked["shapes"]]


def way_of(report: Mapping[str, Any]) -> Way:
    config = report["config"]
    backend, strategy = config["backend"], config["strategy"]
    ours = backend["name"] == "tensorrt"
    options = []
    if ours:
        if backend.get("fused_rows") is False and config["cache"]["name"] != "none":
            options.append("backend.fused_rows=false")
        shape = config["shape"]
        if shape["kind"] == "dynamic" and not shape.get("exact") and strategy["name"] != "upstream":
            options.append("shape.exact=[]")
        if config["cache"].get("chunk"):
            options.append(f"cache.chunk={config['cache']['chunk']}")
        if strategy.get("without"):
            options.append(f"strategy.without=[{','.join(strategy['without'])}]")
        if strategy.get("unproven") not in (None, *STRATEGIES.get(strategy["name"], ())[:1]):
            options.append(f"strategy.unproven={strategy['unproven']}")
        if strategy.get("assume"):
            options.append(f"strategy.assume=[{','.join(strategy['assume'])}]")
    if backend.get("attention"):
        options.append(f"backend.attention={backend['attention']}")
    if config["precision"] in FEW_BITS:
        asked = {key: value for key, value in config["quantize"].items() if key != "calibration" and value}
        options += [f"quantize.{key}={value}" for key, value in asked.items()]
    return Way(
        backend=backend["name"],
        mode=backend.get("mode") or "",
        cudnn=bool(backend.get("cudnn_attention")),
        strategy=strategy["name"] if ours else "",
        options=tuple(options),
        cache=config["cache"]["name"],
        lengths={"static": "one", "dynamic": "every"}[config["shape"]["kind"]],
        precision=config["precision"],
    )


def rows(found: Iterable[Found]) -> list[Row]:
    """A row for each task and way; the fastest of a task first, and those without a time last."""
    groups: dict[tuple[Task, Way], list[Found]] = {}
    for each in found:
        for task in tasks_of(each.report):
            groups.setdefault((task, way_of(each.report)), []).append(each)
    made = []
    for (task, way), reports in groups.items():
        timed = [each for each in reports if measured(each.report, task)]
        made.append(Row(task, way, tuple(timed or reports)))
    return sorted(made, key=lambda row: (row.task, row.time.median if row.time else float("inf"), row.way))


def faster(row: Row, than: Row) -> Ratio:
    """How many times as fast ``row`` is as ``than``, with a 95 % interval."""
    assert row.time and than.time
    return replace(ratio(than.figures, row.figures), value=than.time.median / row.time.median)
