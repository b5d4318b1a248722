"""What a page asks of its rows: which is the fastest at one size of work, and how times grow with length or batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.compare.labels import Section, names
from pipeline.compare.ratios import Ratio, ratio
from pipeline.compare.rows import Figure, Measure, Row

Axis = Literal["input_length", "batch"]
AXES: tuple[Axis, ...] = ("input_length", "batch")
IGNORED: dict[Axis, tuple[str, ...]] = {
    "input_length": ("lengths", "shape.", "cache.capacity"),
    "batch": ("batch", "shape.batch"),
}
"""Words and settings in which the rows of one line may differ: they follow from the size along the axis."""


@dataclass(frozen=True)
class Line:
    """The rows that differ only in the size along the axis."""

    label: str
    points: dict[int, list[Row]]
    """Size -> the rows that have it: more than one where a run was repeated."""
    measures: dict[int, Measure]

    @property
    def first(self) -> Row:
        return next(iter(self.points.values()))[0]

    def figures(self, size: int) -> list[Figure]:
        return [row.timings[self.measures[size]].time for row in self.points[size]]

    def median(self, size: int) -> float:
        """In ms; of repetitions their mean, as :func:`pipeline.compare.ratios.ratio` takes it."""
        return float(np.mean([figure.median for figure in self.figures(size)]))


@dataclass(frozen=True)
class Sweep:
    """One question at several sizes."""

    measures: dict[int, Measure]
    """By the size along the axis, which rises."""
    axis: Axis
    lines: list[Line]

    @property
    def sizes(self) -> list[int]:
        return list(self.measures)

    @property
    def measure(self) -> Measure:
        """The largest of them."""
        return self.measures[self.sizes[-1]]

    @property
    def title(self) -> str:
        of = self.measure
        what = {"prefill": "A prompt", "generate": "Generation"}[of.kind] if of.clock == "device_ms" else of.what
        fixed = [f"{of.input_length} tokens{' in' if of.output_length else ''}"] if self.axis == "batch" else []
        fixed += [f"{of.output_length}{'' if fixed else ' tokens'} out"] if of.output_length else []
        fixed += [f"batch {of.batch}"] if self.axis == "input_length" and of.batch > 1 else []
        by = "by its length" if self.axis == "input_length" and of.kind == "prefill" else self.by
        return ", ".join([what[0].upper() + what[1:], *fixed, by])

    @property
    def by(self) -> str:
        return "by the prompt's length" if self.axis == "input_length" else "by batch"

    def at(self, size: int) -> str:
        """A size along the axis, in words."""
        return f"{size} tokens" if self.axis == "input_length" else f"batch {size}"

    def between(self, first: int, last: int) -> str:
        return self.at(last) if first == last else f"{first} to {last} tokens" if self.axis == "input_length" else (
            f"batch {first} to {last}")  # fmt: skip


def sweeps(section: Section) -> list[Sweep]:
    """The measures of ``section`` that differ in length alone, then those in batch alone that are in none of these."""
    found: list[Sweep] = []
    for axis in AXES:
        groups: dict[Measure, dict[int, Measure]] = defaultdict(dict)
        for measure in sorted(section.measures):
            kind, batch, length, output, clock = measure
            if axis == "batch":
                groups[Measure(kind, 0, length, output, clock)][batch] = measure
            else:
                groups[Measure(kind, batch, 0, output, clock)][length] = measure
        covered = {measure for sweep in found for measure in sweep.measures.values()}
        for measures in groups.values():
            if len(measures) > 1 and not covered.issuperset(measures.values()):
                lines = _lines(section, measures, axis)
                sizes = {size for line in lines for size in line.points}
                if lines:
                    found.append(Sweep({size: m for size, m in measures.items() if size in sizes}, axis, lines))
    order = {measure: i for i, measure in enumerate(section.measures)}
    return sorted(found, key=lambda sweep: min(order[measure] for measure in sweep.measures.values()))


def _lines(section: Section, measures: dict[int, Measure], axis: Axis) -> list[Line]:
    """Of two points or more; the fastest at the largest size first."""
    groups: dict[tuple[object, ...], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for size, measure in measures.items():
        for row in section.timed(measure):
            kept = {key: value for key, value in row.axes.items() if not _follows(key, axis)}
            groups[tuple(sorted(kept.items()))][size].append(row)
    chosen = [points for points in groups.values() if len(points) > 1]
    called = names([next(iter(points.values()))[0] for points in chosen], IGNORED[axis])
    lines = [Line(name, dict(points), measures) for name, points in zip(called, chosen, strict=True)]
    return sorted(lines, key=lambda line: (-max(line.points), line.median(max(line.points))))


def _follows(key: str, axis: Axis) -> bool:
    return key != "shape.kind" and key.startswith(IGNORED[axis]) and not (
        axis == "input_length" and key == "shape.batch")  # fmt: skip


def single(section: Section, found: list[Sweep]) -> Iterator[Measure]:
    """The measures that need a chart of their own: those that some row has that is on no line of ``found``."""
    for measure in section.measures:
        drawn = {
            id(row)
            for sweep in found
            for line in sweep.lines
            for size, rows in line.points.items()
            if sweep.measures.get(size) == measure
            for row in rows
        }
        if any(id(row) not in drawn for row in section.timed(measure)):
            yield measure


def over(line: Line, reference: Line | None, size: int) -> Ratio | None:
    """How many times as fast as ``reference`` at ``size``; None where that is no question."""
    if reference is None or line is reference or size not in reference.points or size not in line.points:
        return None
    return ratio(line.figures(size), reference.figures(size)).inverse
