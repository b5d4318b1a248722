"""Charts as numbers: everything in per cent of the width of the plot, for the page to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.compare import remarks
from pipeline.compare.baseline import Against, baselines, told
from pipeline.compare.labels import Section, shared
from pipeline.compare.numbers import number
from pipeline.compare.rows import Measure, Row, Timing
from pipeline.compare.verdicts import Standing
from pipeline.config.choices import STAGES

MARGIN = 1.04  # of the longest bar: its whisker must not touch the edge


@dataclass(frozen=True)
class Segment:
    """One piece of a bar."""

    start: float
    width: float
    css: str
    tip: str


@dataclass(frozen=True)
class Bar:
    """One row of a chart."""

    label: str
    value: str
    segments: list[Segment] = field(default_factory=list)
    whisker: tuple[float, float] | None = None
    mark: float | None = None
    """A tick across the bar: the roofline's floor, or PyTorch's own error."""
    mark_tip: str = ""
    ratio: str = ""
    """How many times as fast, and as what."""


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    note: str
    bars: list[Bar]
    ticks: list[tuple[float, str]]
    """Position and text."""
    over: str = ""
    """What its ratios are over, where it is one row."""
    limit: float | None = None
    """A line over the plot: what is allowed."""
    legend: list[str] = field(default_factory=list)


def ticks(maximum: float) -> list[float]:
    """About five round numbers from 0 up to ``maximum``."""
    raw = maximum / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.floor(maximum / step * (1 + 1e-9)) + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times each power of ten from ``low`` to ``high``, both above 0."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [mark for e in exponents for factor in (1, 2, 5) if low <= (mark := factor * 10.0**e) <= high]


def _axis(maximum: float, suffix: str = "") -> list[tuple[float, str]]:
    return [(100 * tick / maximum, f"{tick:g}{suffix}") for tick in ticks(maximum)]


def _css(row: Row, leaders: Sequence[Row] = ()) -> str:
    kind = "rival" if row.rival else "engine"
    return f"{kind} fastest" if any(row is leader for leader in leaders) else kind


def _tip(name: str, timing: Timing) -> str:
    time = timing.time
    text = f"{name}: {number(time.median, 4)} ms, 95 % interval {number(time.low, 4)} to {number(time.high, 4)}"
    return "; ".join([text, *timing.tainted])


def time_chart(
    section: Section, measure: Measure, ranked: Standing, compared: Mapping[int, Against], baseline: set[int],
    names: Mapping[int, str] | None = None,
) -> Chart:  # fmt: skip
    """Median device times with their intervals; ``compared``, ``baseline`` and ``names`` go by ``id`` of the row."""
    rows = section.timed(measure)
    called = names or {id(row): row.label for row in rows}
    timings = [row.timings[measure] for row in rows]
    longest = max(max(timing.time.high, timing.time.median) for timing in timings) * MARGIN
    everywhere = remarks.said_of_all(rows, timings)
    over = baselines(rows, compared, called)
    bars = []
    for row, timing in zip(rows, timings, strict=True):
        time, floor, name = timing.time, timing.floor_ms, called[id(row)]
        against = compared.get(id(row))
        faster = against.time.inverse if against and against.time else None
        ratio, tip = "baseline" if id(row) in baseline else "", _tip(name, timing)
        if faster:
            tip += f"; {faster}× as fast as {told(row, against, called)}"
            ratio = f"{faster.value:.2f}×" + (f" {told(row, against, called)}" if len(over) > 1 else "")
        doubted = any(remarks.of_taint(text).warns for text in timing.tainted) and not everywhere
        bars.append(
            Bar(
                name + ("\N{NO-BREAK SPACE}⚠" if doubted else ""),
                f"{number(time.median)} ms",
                [Segment(0, 100 * time.median / longest, _css(row, ranked.leaders), tip)],
                (100 * time.low / longest, 100 * time.high / longest),
                None if floor is None else 100 * floor / longest,
                "" if floor is None else f"roofline: no less than {number(floor)} ms on this card",
                ratio,
            )
        )
    named = f"×: times as fast as {over[0] if len(over) == 1 else 'the row named beside it'}" if over else ""
    note = f"All rows: {', '.join(each.word for each in everywhere)}." if everywhere else ""
    return Chart(measure.question, ", ".join(["ms", *shared(rows)]), note, bars, _axis(longest), named)


def accuracy_chart(section: Section) -> Chart | None:
    """The worst case of each row's verification, as a share of what is allowed."""
    rows = [row for row in section.rows if row.accuracy]
    if not rows:
        return None
    most = 100 * min(3.0, max([1.25, *(row.accuracy.share for row in rows if row.accuracy)]))
    bars = []
    for row in rows:
        accuracy = row.accuracy
        assert accuracy is not None
        share = 100 * accuracy.share
        shown = f"{share:.0f} %" if math.isfinite(share) else "not finite"
        error = "none finite" if accuracy.relative_error is None else number(accuracy.relative_error, 2)
        allowed = "none" if accuracy.tolerance is None else number(accuracy.tolerance, 2)
        own = accuracy.pytorch_share
        tip = f"{row.label}, {accuracy.case}, on the {accuracy.executed}: relative error {error}, allowed {allowed}" + (
            "" if own is None else f"; PyTorch at this precision: {100 * own:.0f} % of what is allowed"
        )
        css = (_css(row) if accuracy.passed else "bad") + (" graph" if accuracy.executed == "graph" else "")
        bars.append(
            Bar(
                row.label,
                f"{shown} of {allowed}" + ("" if accuracy.passed else ", FAILED"),
                [Segment(0, 100 * min(share, most) / most, css, tip)],
                mark=None if own is None else 100 * min(100 * own, most) / most,
                mark_tip="" if own is None else "PyTorch's own error at this precision",
            )
        )
    note = "Worst case against PyTorch in wider precision. Line: what is allowed; tick: PyTorch's own error."
    if any(row.accuracy and row.accuracy.executed == "graph" for row in rows):
        note += " Pale: the rewritten graph was judged in PyTorch, since no GPU could run the engine."
    return Chart("Accuracy", "error, share of what is allowed", note, bars, _axis(most, " %"), limit=100 * 100 / most)


def stage_chart(section: Section) -> Chart | None:
    """Where the time of a whole run went."""
    rows = [row for row in section.rows if row.stages_s]
    longest = max((sum(row.stages_s.values()) for row in rows), default=0.0) * MARGIN
    if not longest:
        return None
    bars, seen = [], set()
    for row in rows:
        start, segments = 0.0, []
        for name, seconds in row.stages_s.items():
            width = 100 * seconds / longest
            segments.append(Segment(start, width, f"stage-{_stage(name)}", f"{name}: {number(seconds)} s"))
            start += width
            seen.add(_stage(name))
        bars.append(Bar(row.label, f"{number(sum(row.stages_s.values()))} s", segments))
    legend = [name for name in (*STAGES, "other") if name in seen]
    return Chart("Stages", "s", "Once for a build, not for each prompt; cold and warm as it came.", bars,
                 _axis(longest), legend=legend)  # fmt: skip


def _stage(name: str) -> str:
    return name if name in STAGES else "other"
