"""Quality against time and bytes as a picture of the same kind as :mod:`benchmarks.pictures`: panels in two columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from xml.sax.saxutils import escape

from benchmarks.pictures import EDGE, WIDTH, framed, head, line, text
from pipeline.compare.fronts import Front, Point

HEIGHT, AXIS, GAP, COLUMNS = 200, 46, 28, 2
"""Of the plot of a panel; what stands at its left; between two panels.  In pixels."""
LINE = 18
"""Of the list of a panel's rows, under its plot."""
LEGEND = {"fastest": "worth having", "engine": "beaten in both", "rival": "lost more than is allowed"}


@dataclass(frozen=True)
class Panel:
    model: str
    front: Front


def svg(title: str, notes: Sequence[str], panels: Sequence[Panel]) -> str:
    """One picture of ``panels``, two side by side."""
    points = [point for panel in panels for point in panel.front.points]
    seen = {_css(point) for point in points}
    shared = _shared([point.label for point in points])
    said = [*notes, f"Every row: {shared}."] if shared else notes
    body, y = head(title, said, {css: said for css, said in LEGEND.items() if css in seen})
    width = (WIDTH - 2 * EDGE - GAP * (COLUMNS - 1)) / COLUMNS
    top = float(y + 30)
    for first in range(0, len(panels), COLUMNS):
        row = panels[first : first + COLUMNS]
        for i, panel in enumerate(row):
            body += _panel(panel, shared, EDGE + i * (width + GAP), top, width)
        top += HEIGHT + 74 + LINE * max(len(panel.front.points) for panel in row)
    described = " ".join(
        f"{panel.model}, {panel.front.title}: "
        + "; ".join(f"{point.label} {point.cells[0]}, {point.cells[2]}" for point in panel.front.points)
        + "."
        for panel in panels
    )
    return framed(title, described, body, round(top) - 20)


def _shared(labels: Sequence[str]) -> str:
    """With what all of several ``labels`` begin, in whole parts, each having more to say; empty where they differ."""
    parts = [label.split(", ")[:-1] for label in labels]
    alike = takewhile(lambda each: len(set(each)) == 1, zip(*parts, strict=False))
    return ", ".join(each[0] for each in alike) if len(parts) > 1 else ""


def _panel(panel: Panel, shared: str, left: float, top: float, width: float) -> Iterator[str]:
    front = panel.front
    begin, above = left + AXIS, top + 16
    across, bottom = width - AXIS - 16, top + 16 + HEIGHT

    def x(per_cent: float) -> float:
        return begin + across * per_cent / 100

    def y(per_cent: float) -> float:
        return round(above + HEIGHT * per_cent / 100, 2)

    yield text(left, top, f"{panel.model}: rise of perplexity, %, over {front.price}", "head")
    for at, said in front.y_ticks:
        yield line("grid", begin, y(at), begin + across, y(at))
        yield text(begin - 8, y(at) + 4, said, "dim", "end")
    for at, said in front.x_ticks:
        yield line("grid", x(at), above, x(at), bottom)
        yield text(x(at), bottom + 16, said, "dim", "middle")
    if len(front.steps) > 1:
        path = " ".join(f"{x(at):.2f},{y(rise):g}" for at, rise in front.steps)
        yield f'<polyline class="curve fastest" points="{path}"/>'
    for number, point in enumerate(front.points, 1):
        yield line("whisker", x(point.x), y(point.low), x(point.x), y(point.high))
        tip = f"<title>{escape(point.tip)}</title>"
        yield f'<circle class="{_css(point)}" cx="{x(point.x):.2f}" cy="{y(point.y):g}" r="5">{tip}</circle>'
        yield text(x(point.x) + 8, y(point.y) - 6, str(number), "dim")
        label = point.label.removeprefix(f"{shared}, ")
        said = f"{number}  {label}: {point.cells[0]}, {point.cells[2].partition(' (')[0]}"
        yield text(begin, bottom + 18 + LINE * number, said, "dim")


def _css(point: Point) -> str:
    """Of the classes that pictures have."""
    return "fastest" if point.worth else "rival" if point.css == "bad" else "engine"
