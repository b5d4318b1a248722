"""Rows that belong side by side, and the shortest names that tell them apart."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.compare.rows import Measure, Row

VERSIONS = ("flavour", "tensorrt", "torch", "torch_tensorrt", "transformers", "driver", "git")


@dataclass(frozen=True)
class Section:
    """The rows of one model on one GPU: those whose times may be compared."""

    model: str
    gpu: str | None
    rows: list[Row]

    @property
    def title(self) -> str:
        return f"{self.model} on {self.gpu}" if self.gpu else f"{self.model}, no GPU"

    @property
    def measures(self) -> list[Measure]:
        """What was timed, whole before its parts."""
        order = {"device_ms": 0, "ttft_ms": 1, "tpot_ms": 2}
        found = {measure for row in self.rows for measure in row.timings}
        return sorted(found, key=lambda m: (m.kind != "generate", m[1:4], order[m.clock]))

    def timed(self, measure: Measure) -> list[Row]:
        """The rows that have ``measure``, fastest first."""
        rows = [row for row in self.rows if measure in row.timings]
        return sorted(rows, key=lambda row: row.timings[measure].time.median)

    @property
    def versions(self) -> list[tuple[str, list[str]]]:
        """What ran, and every version of it that is here: one, where nothing but the settings differs."""
        return [
            (key, sorted({str(row.environment[key]) for row in self.rows if row.environment.get(key)}))
            for key in ("compute_capability", *VERSIONS, "python")
            if any(row.environment.get(key) for row in self.rows)
        ]

    @property
    def unsupported(self) -> bool:
        return any(not row.supported for row in self.rows)


def sections(rows: list[Row]) -> list[Section]:
    """``rows`` by model and GPU (none last), labelled; the fastest first in each, those without a time last."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.model, row.gpu or ""].append(row)
    made = []
    for (model, gpu), members in sorted(groups.items(), key=lambda item: (not item[0][1], item[0])):
        label(members)
        section = Section(model, gpu or None, members)
        headline = section.measures[:1]
        members.sort(key=lambda row: (min([row.timings[m].time.median for m in headline if m in row.timings] or
                                          [float("inf")]), row.status, row.label))  # fmt: skip
        made.append(section)
    return made


def label(rows: list[Row]) -> None:
    """Name each row by its strategy or rival, and by what else differs here: settings, then versions, then names."""
    named: dict[str, Callable[[Row], str]] = {
        "precision": lambda row: row.axes.get("precision", ""),
        "shape": _shape,
        "cache": lambda row: f"{row.axes.get('cache.name', 'none')} cache".replace("none", "no"),
        "inputs": lambda row: row.axes.get("model.inputs", ""),
    }
    kept = [name for name, text in named.items() if len({text(row) for row in rows}) > 1]
    for row in rows:
        row.label = " · ".join([row.how, *(named[name](row) for name in kept)])
    told = (
        "precision", "shape.kind", "shape.batch", "shape.min", "shape.max", "cache.name", "model.inputs",
        "strategy.name", "backend.name", "model.name",
    )  # fmt: skip
    for alike in _alike(rows):
        settings = {key for row in alike for key in row.axes if not key.startswith(told)}
        _append(alike, {key: [row.axes.get(key, "unset") for row in alike] for key in sorted(settings)})
    for alike in _alike(rows):
        _append(alike, {key: [str(row.environment.get(key)) for row in alike] for key in VERSIONS})
    for alike in _alike(rows):
        for number, row in enumerate(sorted(alike, key=lambda row: row.name), 1):
            row.label += f" · run {number}"


def _shape(row: Row) -> str:
    kind, batch = row.axes.get("shape.kind", ""), row.axes.get("shape.batch", "1")
    least, most = row.axes.get("shape.min", "?"), row.axes.get("shape.max", "?")
    length = f"{kind} {least}..{most}" if kind == "dynamic" else f"{kind} {most}"
    return length + (f" batch {batch}" if batch != "1" else "")


def _alike(rows: list[Row]) -> list[list[Row]]:
    often = Counter(row.label for row in rows)
    return [[row for row in rows if row.label == text] for text, count in often.items() if count > 1]


def _append(rows: list[Row], values: dict[str, list[str]]) -> None:
    for key, texts in values.items():
        if len(set(texts)) > 1:
            for row, text in zip(rows, texts, strict=True):
                row.label += f" · {key.rpartition('.')[2]} {text}"
