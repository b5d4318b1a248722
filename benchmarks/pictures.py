"""Charts of the comparison as pictures that stand alone: SVG with its text as text, in the page's colours.

The picture brings a ground of its own and follows the reader's colour scheme, so it is readable on a light and on a
dark page, also where the two disagree.  The same charts give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from textwrap import wrap
from typing import NamedTuple
from xml.sax.saxutils import escape

from pipeline.compare.charts import Bar, Chart

WIDTH, EDGE = 860, 20
VALUE = 76
"""Column at the right of the plot, in pixels; the one at the left is as wide as its longest label."""
LETTER = 7.4
"""Width of a letter of a label: the widest font of :data:`FONT` at 13 pixels."""
NOTE = 122
"""Letters of a note in one line."""
ROW, BAR = 22, 14
FONT = 'system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'
FILLS = ("engine", "rival", "fastest", "stage-strategy", "stage-lower")
"""Classes of bars and lines that are drawn here; the page has them under the same names."""


def colours() -> tuple[dict[str, str], dict[str, str]]:
    """Name -> colour on a light and on a dark ground, as the comparison's page has them."""
    css = files("pipeline.compare").joinpath("page.css").read_text("utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    )
    return light, dark


class _Plot(NamedTuple):
    left: float
    width: float

    def x(self, per_cent: float) -> float:
        return self.left + per_cent * self.width / 100


def svg(title: str, notes: Sequence[str], charts: Sequence[Chart], legend: Mapping[str, str]) -> str:
    """One picture of ``charts``, one under the other; ``legend``: class of a bar -> what it stands for."""
    left = round(EDGE + 10 + LETTER * max(len(bar.label) for chart in charts for bar in chart.bars))
    plot = _Plot(left, WIDTH - EDGE - VALUE - left)
    body, y = head(title, notes, legend)
    for chart in charts:
        y += 34
        body.append(text(EDGE, y, f"{chart.title}{', ' if chart.unit else ''}{chart.unit}", "head"))
        y += 8
        bottom = y + ROW * len(chart.bars)
        for at, said in chart.ticks:
            body.append(line("grid", plot.x(at), y, plot.x(at), bottom))
            body.append(text(plot.x(at), bottom + 15, said, "dim", "middle"))
        for bar in chart.bars:
            body += _bar(bar, plot, y)
            y += ROW
        y += 16
    described = " ".join(
        f"{chart.title}: {'; '.join(f'{bar.label} {bar.value}' for bar in chart.bars)}." for chart in charts
    )
    return framed(title, described, body, y + EDGE)


def head(title: str, notes: Sequence[str], legend: Mapping[str, str]) -> tuple[list[str], int]:
    """Title, notes and legend at the top of a picture, and where what follows may begin."""
    body = [text(EDGE, 34, title, "title")]
    y = 40
    for note in (part for said in notes for part in wrap(said, NOTE)):
        y += 17
        body.append(text(EDGE, y, note, "dim"))
    y += 26 if legend else 0
    x = EDGE
    for css, said in legend.items():
        body += [f'<rect class="{css}" x="{x}" y="{y - 10}" width="11" height="11"/>', text(x + 17, y, said)]
        x += 40 + 7 * len(said)
    return body, y


def framed(title: str, described: str, body: Sequence[str], height: int) -> str:
    """The whole file; ``described`` is for whom the picture is read out."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(described)}</desc>",
            f"<style>{_style()}</style>",
            f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
            *body,
            "</svg>\n",
        ]
    )


def _bar(bar: Bar, plot: _Plot, y: float) -> Iterator[str]:
    middle = y + ROW / 2
    yield text(plot.left - 10, middle + 4, bar.label, anchor="end")
    for segment in bar.segments:
        css = segment.css.split()[-1]
        yield (
            f'<rect class="{css}" x="{plot.x(segment.start):.2f}" y="{middle - BAR / 2:g}" '
            f'width="{segment.width * plot.width / 100:.2f}" height="{BAR}"><title>{escape(segment.tip)}</title></rect>'
        )
    if bar.whisker:
        low, high = map(plot.x, bar.whisker)
        yield line("whisker", low, middle, high, middle)
        for end in (low, high):
            yield line("whisker", end, middle - 4, end, middle + 4)
    if bar.mark is not None:
        yield line("mark", plot.x(bar.mark), y, plot.x(bar.mark), y + ROW)
    yield text(WIDTH - EDGE, middle + 4, bar.value, "value", "end")


def line(css: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{css}" x1="{x1:.2f}" y1="{y1:g}" x2="{x2:.2f}" y2="{y2:g}"/>'


def text(x: float, y: float, said: str, css: str = "", anchor: str = "start") -> str:
    kind = f' class="{css}"' if css else ""
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text{kind} x="{x:.2f}" y="{y:g}"{place}>{escape(said)}</text>'


def _style() -> str:
    light, dark = colours()
    fixed = f"""
text {{ font: 13px {FONT}; }} .title {{ font-size: 18px; font-weight: 600; }} .head {{ font-weight: 600; }}
.dim {{ font-size: 12px; }} .value {{ font-variant-numeric: tabular-nums; }}
.whisker {{ stroke-width: 1.5; }} .mark {{ stroke-width: 1.5; stroke-dasharray: 3 2; }}
.curve {{ fill: none; stroke-width: 2.5; }} .curve.rival {{ stroke-dasharray: 7 4; }}
.curve.stage-strategy {{ stroke-dasharray: 2 4; stroke-linecap: round; }}
"""
    return f"{fixed}{_rules(light)}@media (prefers-color-scheme: dark) {{\n{_rules(dark)}}}\n"


def _rules(colour: Mapping[str, str]) -> str:
    fills = "".join(
        f".{css} {{ fill: {colour[css.removeprefix('stage-')]}; }} "
        f".curve.{css} {{ fill: none; stroke: {colour[css.removeprefix('stage-')]}; }} "
        for css in FILLS
    )
    return (
        f".ground {{ fill: {colour['card']}; stroke: {colour['line']}; }} text {{ fill: {colour['ink']}; }} "
        f".dim {{ fill: {colour['dim']}; }}\n{fills}\n.grid {{ stroke: {colour['grid']}; }} "
        f".whisker {{ stroke: {colour['whisker']}; }} .mark {{ stroke: {colour['floor']}; }}\n"
    )
