"""Lines by length as a picture of the same kind as :mod:`benchmarks.pictures`: panels side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from benchmarks.pictures import EDGE, WIDTH, framed, head, line, text
from pipeline.compare.charts import MARGIN, decades, ticks
from pipeline.compare.numbers import number

HEIGHT, AXIS, GAP = 250, 46, 24
"""Of the plot of a panel; what stands at its left; between two panels.  In pixels."""


@dataclass(frozen=True)
class Line:
    name: str
    css: str
    points: Mapping[int, float]
    """Length -> value; both above 0."""


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    lines: Sequence[Line]
    log: bool
    """Whether the values are drawn by their logarithm; lengths always are."""


def svg(title: str, notes: Sequence[str], panels: Sequence[Panel], legend: Mapping[str, str]) -> str:
    """One picture of ``panels``, side by side; ``legend``: class of a line -> what it stands for."""
    body, y = head(title, notes, legend)
    width = (WIDTH - 2 * EDGE - GAP * (len(panels) - 1)) / len(panels)
    for i, panel in enumerate(panels):
        body += _panel(panel, EDGE + i * (width + GAP), y + 34, width)
    described = " ".join(
        f"{panel.title}: "
        + "; ".join(
            f"{each.name} " + ", ".join(f"{number(value)} {panel.unit} at {n}" for n, value in each.points.items())
            for each in panel.lines
        )
        + "."
        for panel in panels
    )
    return framed(title, described, body, y + 34 + HEIGHT + 40 + EDGE)


def _panel(panel: Panel, left: float, top: float, width: float) -> Iterator[str]:
    lengths = sorted({n for each in panel.lines for n in each.points})
    values = [value for each in panel.lines for value in each.points.values()]
    low, high = (min(values) / 1.3, max(values) * 1.3) if panel.log else (0.0, max(values) * MARGIN)
    marks = decades(low, high) if panel.log else ticks(high)
    begin, end, bottom = left + AXIS, left + width - 22, top + 14 + HEIGHT

    def x(n: int) -> float:
        span = math.log(lengths[-1] / lengths[0]) or 1.0
        return begin + (end - begin) * math.log(n / lengths[0]) / span

    def y(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if panel.log else value / high
        return round(bottom - HEIGHT * share, 2)

    yield text(left, top, f"{panel.title}, {panel.unit}", "head")
    for mark in marks:
        yield line("grid", begin, y(mark), end, y(mark))
        yield text(begin - 8, y(mark) + 4, f"{mark:g}", "dim", "end")
    for n in lengths:
        yield line("grid", x(n), top + 14, x(n), bottom)
        yield text(x(n), bottom + 16, str(n), "dim", "middle")
    yield text((begin + end) / 2, bottom + 34, "tokens of the prompt", "dim", "middle")
    for each in panel.lines:
        path = " ".join(f"{x(n):.2f},{y(value):g}" for n, value in sorted(each.points.items()))
        yield f'<polyline class="curve {each.css}" points="{path}"/>'
        for n, value in sorted(each.points.items()):
            tip = escape(f"{each.name}, {n} tokens: {number(value)} {panel.unit}")
            yield f'<circle class="{each.css}" cx="{x(n):.2f}" cy="{y(value):g}" r="4"><title>{tip}</title></circle>'
