"""Charts as numbers: everything in per cent of the width of the plot, for the page to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.compare.baseline import Against
from pipeline.compare.labels import Section
from pipeline.compare.numbers import number
from pipeline.compare.rows import Measure, Row, Timing
from pipeline.compare.verdicts import Standing
from pipeline.config.schema import STAGES

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
    second: list[Segment] = field(default_factory=list)
    """The bar of the second plot, where there is one."""
    reason: str | None = None
    """In place of a bar: why there is none."""


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    note: str
    bars: list[Bar]
    ticks: list[tuple[float, str]]
    """Position and text."""
    second_unit: str | None = None
    second_ticks: list[tuple[float, str]] = field(default_factory=list)
    limit: float | None = None
    """A line over the second plot: what is allowed."""
    legend: list[str] = field(default_factory=list)


def ticks(maximum: float) -> list[float]:
    """About five round numbers from 0 up to ``maximum``."""
    raw = maximum / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.floor(maximum / step * (1 + 1e-9)) + 1)]


def _axis(maximum: float, suffix: str = "") -> list[tuple[float, str]]:
    return [(100 * tick / maximum, f"{tick:g}{suffix}") for tick in ticks(maximum)]


def _css(row: Row, leaders: Sequence[Row] = ()) -> str:
    kind = "rival" if row.axes.get("backend.name", "tensorrt") != "tensorrt" else "engine"
    return f"{kind} fastest" if any(row is leader for leader in leaders) else kind


def _tip(row: Row, timing: Timing) -> str:
    time = timing.time
    text = f"{row.label}: {number(time.median, 4)} ms, 95 % interval {number(time.low, 4)} to {number(time.high, 4)}"
    return "; ".join([text, *timing.tainted])


def untimed(section: Section) -> list[Bar]:
    """The rows that have no time at all, with the reason."""
    return [Bar(row.label, row.status, reason=row.reason) for row in section.rows if not row.timings]


def time_chart(
    section: Section, measure: Measure, ranked: Standing, compared: dict[int, Against], baseline: set[int]
) -> Chart:
    """Median device times with their intervals; ``compared`` and ``baseline`` go by ``id`` of the row."""
    rows = section.timed(measure)
    longest = max(max(row.timings[measure].time.high, row.timings[measure].time.median) for row in rows) * MARGIN
    bars, has_floor = [], False
    for row in rows:
        timing = row.timings[measure]
        time, floor = timing.time, timing.floor_ms
        has_floor |= floor is not None
        value = f"{number(time.median)} ms"
        if (against := compared.get(id(row))) and against.time:
            value += f" · {against.time.inverse.value:.2f}×"
        elif id(row) in baseline:
            value += " · baseline"
        bars.append(
            Bar(
                row.label + (" ⚠" if timing.tainted else ""),
                value,
                [Segment(0, 100 * time.median / longest, _css(row, ranked.leaders), _tip(row, timing))],
                (100 * time.low / longest, 100 * time.high / longest),
                None if floor is None else 100 * floor / longest,
                "" if floor is None else f"roofline: no less than {number(floor)} ms on this card",
            )
        )
    note = "Whisker: 95 % interval."
    note += " Dotted tick: the least that this card needs (roofline)." if has_floor else ""
    note += " ⚠: tainted, see the remarks." if any(row.timings[measure].tainted for row in rows) else ""
    return Chart(f"{measure.what.capitalize()}, {measure.size}", "ms on the device, less is better", note,
                 bars, _axis(longest))  # fmt: skip


def roofline_chart(section: Section, measure: Measure) -> Chart | None:
    rows = [row for row in section.timed(measure) if row.timings[measure].roofline_fraction]
    if not rows:
        return None
    fractions = [100 * (row.timings[measure].roofline_fraction or 0) for row in rows]
    longest = max(100.0, max(fractions) * MARGIN)
    bars = [
        Bar(row.label, f"{fraction:.0f} %", [Segment(0, 100 * fraction / longest, _css(row),
            f"{row.label}: the roofline's floor of {number(row.timings[measure].floor_ms or 0)} ms is {fraction:.1f} % "
            "of its time")])
        for row, fraction in zip(rows, fractions, strict=True)
    ]  # fmt: skip
    note = "Least time by measured copy bandwidth and matrix rate of this card, over the time taken."
    return Chart(f"Roofline, {measure.what}", "of the roofline, more is better", note, bars, _axis(longest, " %"))


def accuracy_chart(section: Section) -> Chart | None:
    """Time beside error: a row that is fast and near its limit should be seen to be both."""
    measure = max(section.measures, key=lambda each: len(section.timed(each)), default=None)
    rows = [row for row in section.rows if row.accuracy]
    if not rows:
        return None
    times = {id(row): row.timings[measure] for row in rows if measure is not None and measure in row.timings}
    longest = max((timing.time.median for timing in times.values()), default=1.0) * MARGIN
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
        timing = times.get(id(row))
        first = []
        if timing is not None and measure is not None:
            width = 100 * timing.time.median / longest
            first = [Segment(0, width, _css(row), _tip(row, timing))]
        bars.append(
            Bar(
                row.label,
                f"{shown} of {allowed}" + ("" if accuracy.passed else ", FAILED"),
                first,
                second=[Segment(0, 100 * min(share, most) / most, css, tip)],
                mark=None if own is None else 100 * min(100 * own, most) / most,
                mark_tip="" if own is None else "PyTorch's own error at this precision",
                reason=None if first else "no time",
            )
        )
    note = (
        "Error: of the worst case of the verification, against PyTorch in wider precision, as a share of what is "
        "allowed (line). Tick: PyTorch's own error at this precision."
    )
    if any(row.accuracy and row.accuracy.executed == "graph" for row in rows):
        note += " Pale: the rewritten graph was judged in PyTorch, since no GPU could run the engine."
    title = "Accuracy beside speed"
    unit = f"ms, {measure.what}" if times and measure else "time"
    return Chart(title, unit, note, bars, _axis(longest) if times else [], "error, share of what is allowed",
                 _axis(most, " %"), 100 * 100 / most)  # fmt: skip


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
    return Chart("Stages", "s, cold and warm as it came", "Once for a build, not for each pass.", bars,
                 _axis(longest), legend=legend)  # fmt: skip


def _stage(name: str) -> str:
    return name if name in STAGES else "other"
