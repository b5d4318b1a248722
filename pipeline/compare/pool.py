"""Repetitions as one row: reports of the same settings, card and versions, each from a process of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from pipeline.compare.labels import VERSIONS
from pipeline.compare.ratios import spread
from pipeline.compare.rows import Figure, Row, Timing


def pooled(rows: Iterable[Row]) -> list[Row]:
    """``rows``, with one in place of all that timed the same in the same way; what was not timed stays as it is."""
    groups: dict[object, list[Row]] = defaultdict(list)
    for row in rows:
        versions = tuple(str(row.environment.get(key)) for key in VERSIONS)
        alike = row.model, row.gpu, tuple(sorted(row.axes.items())), versions, frozenset(row.timings)
        groups[alike if row.timings else id(row)].append(row)
    return [group[0] if len(group) == 1 else _one(group) for group in groups.values()]


def _one(group: Sequence[Row]) -> Row:
    first = group[0]
    said = f"{len(group)} runs: the mean of their medians; the interval has what differs from run to run"
    accuracies = [row.accuracy for row in group if row.accuracy]
    return replace(
        first,
        timings={measure: _timing([row.timings[measure] for row in group]) for measure in first.timings},
        accuracy=max(accuracies, key=lambda each: (not each.passed, each.share), default=None),
        stages_s={name: _mean(row.stages_s.get(name) for row in group) or 0.0 for name in first.stages_s},
        peak_bytes=max((row.peak_bytes for row in group if row.peak_bytes), default=None),
        notes=[said, *dict.fromkeys(note for row in group for note in row.notes)],
        runs=len(group),
    )


def _timing(each: Sequence[Timing]) -> Timing:
    figures = [timing.time for timing in each]
    low, high = spread(figures)
    return Timing(
        Figure(float(np.mean([figure.median for figure in figures])), low, high),
        _mean([timing.host_ms for timing in each]),
        _mean([timing.floor_ms for timing in each]),
        _mean([timing.roofline_fraction for timing in each]),
        list(dict.fromkeys(taint for timing in each for taint in timing.tainted)),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
