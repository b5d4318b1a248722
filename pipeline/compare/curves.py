"""Charts of a sweep: time over the prompt's length or the batch, a line for each way, and the same figures beneath."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.compare.charts import MARGIN, decades, ticks
from pipeline.compare.labels import shared
from pipeline.compare.numbers import number
from pipeline.compare.questions import Line, Sweep, over

LEFT, RIGHT = 3.0, 97.0
"""Of the plot's width in per cent: where the smallest and the largest size are."""
LOGARITHMIC = 20
"""Times as large as the smallest value must the largest be for a scale that starts at 0 to hide the differences."""
COLOURS = 8


@dataclass(frozen=True)
class Curve:
    label: str
    css: str
    points: list[tuple[float, float, str]]
    """Place from the left and from the top, in per cent, and a tip."""
    cells: list[tuple[str, str]]
    """For each size: the time or the memory, and how many times as fast as the reference."""


@dataclass(frozen=True)
class CurveChart:
    title: str
    unit: str
    note: str
    figures: str
    """The unit of the cells."""
    curves: list[Curve]
    sizes: list[int]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    """From the top, in per cent."""
    over: str = ""
    """What its ratios are over."""


def memory_chart(sweep: Sweep, ways: Sequence[str]) -> CurveChart | None:
    """The device memory that the rows of ``sweep`` took at most; None where fewer than two sizes have it."""
    values = {
        (line.label, size): max(peaks) / 1e9
        for line in sweep.lines
        for size, rows in line.points.items()
        if (peaks := [row.peak_bytes for row in rows if row.peak_bytes]) and not _shares_a_run(line)
    }
    if len({size for _, size in values}) < 2:
        return None

    def cell(line: Line, size: int) -> tuple[str, str, str]:
        shown = f"{values[line.label, size]:.1f}"
        return shown, "", f"{line.label}, {sweep.at(size)}: {shown} GB"

    return _drawn(f"Device memory, {sweep.by}", "GB", "GB", sweep, values, cell, ways)


def _shares_a_run(line: Line) -> bool:
    """Whether one run timed several sizes: its memory is that of them all, and of none."""
    return len({id(rows[0]) for rows in line.points.values()}) < len(line.points)


def curve_chart(sweep: Sweep, reference: Line | None, ways: Sequence[str]) -> CurveChart:
    """Times of a prompt are drawn per token: where they are level, time grows with the length.

    ``ways``: the strategies and rivals of all sweeps of a section, so that each has one colour there.
    """
    values = {(line.label, size): _value(sweep, line, size) for line in sweep.lines for size in line.points}

    def cell(line: Line, size: int) -> tuple[str, str, str]:
        faster = over(line, reference, size)
        shown = number(line.median(size))
        tip = f"{line.label}, {sweep.at(size)}: {shown} ms"
        tip += f", {faster} as fast as {reference.label}" if faster and reference else ""
        return shown, f"{faster.value:.2f}×" if faster else "", tip

    unit = "µs per token of the prompt" if _per_token(sweep) else "ms"
    chart = _drawn(sweep.title, unit, "ms", sweep, values, cell, ways)
    return replace(chart, over=f"×: times as fast as {reference.label}") if reference else chart


def _drawn(
    title: str, unit: str, figures: str, sweep: Sweep, values: Mapping[tuple[str, int], float],
    cell: Callable[[Line, int], tuple[str, str, str]], ways: Sequence[str],
) -> CurveChart:  # fmt: skip
    """``values``: label of a line and size -> what is drawn; ``cell``: what the table has for them, and the tip."""
    low, high = min(values.values()), max(values.values()) * MARGIN
    logarithmic = high > LOGARITHMIC * low

    def y(value: float) -> float:
        if logarithmic:
            return 100 - 100 * math.log(value / (low / MARGIN)) / math.log(high / (low / MARGIN))
        return 100 - 100 * value / high

    curves = []
    for line, colour in zip(sweep.lines, _colours(sweep.lines, ways), strict=True):
        here = [(line.label, size) in values for size in sweep.sizes]
        cells = [cell(line, size) if known else ("–", "", "") for size, known in zip(sweep.sizes, here, strict=True)]
        points = [
            (_x(sweep.sizes, size), y(values[line.label, size]), tip)
            for size, known, (_, _, tip) in zip(sweep.sizes, here, cells, strict=True)
            if known
        ]
        curves.append(Curve(line.label, f"line-{colour + 1}", points, [(shown, more) for shown, more, _ in cells]))
    marks = decades(low / MARGIN, high) if logarithmic else ticks(high)
    rows = [row for line in sweep.lines for each in line.points.values() for row in each]
    return CurveChart(
        title,
        ", ".join([unit, *shared(rows)]),
        "Logarithmic scale." if logarithmic else "",
        figures,
        curves,
        sweep.sizes,
        [(_x(sweep.sizes, size), str(size)) for size in sweep.sizes],
        [(y(mark), f"{mark:g}") for mark in marks],
    )


def _colours(lines: Sequence[Line], ways: Sequence[str]) -> list[int]:
    """That of its strategy or rival for each line, the next free one where another line has it."""
    taken: list[int] = []
    for line in lines:
        first = ways.index(line.first.how)
        nearest = [(first + i) % COLOURS for i in range(COLOURS)]
        taken.append(next((colour for colour in nearest if colour not in taken), first % COLOURS))
    return taken


def _per_token(sweep: Sweep) -> bool:
    of = sweep.measure
    return of.clock == "ttft_ms" or (of.kind == "prefill" and of.clock == "device_ms")


def _value(sweep: Sweep, line: Line, size: int) -> float:
    measure = sweep.measures[size]
    return line.median(size) * (1000 / (measure.batch * measure.input_length) if _per_token(sweep) else 1)


def _x(sizes: Sequence[int], size: int) -> float:
    """Logarithmic: lengths and batches are doubled, not counted up."""
    return LEFT + (RIGHT - LEFT) * math.log(size / sizes[0]) / math.log(sizes[-1] / sizes[0])
