"""The comparison as one HTML page and one Markdown file."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.resources import files

from jinja2 import DictLoader, Environment, StrictUndefined, select_autoescape

from pipeline.compare import charts
from pipeline.compare.baseline import Against
from pipeline.compare.labels import Section
from pipeline.compare.numbers import number
from pipeline.compare.rows import Measure, Row
from pipeline.compare.verdicts import Verdict, cautions, standing, verdict
from pipeline.record import markdown

TEMPLATES = ("page.html", "page.md", "page.css")


@dataclass(frozen=True)
class Table:
    header: list[str]
    lines: list[tuple[list[str], Row]]
    """The cells of a row; its link and its status are the row's own."""
    remarks: list[str]


@dataclass(frozen=True)
class Shown:
    """One section as the page shows it."""

    section: Section
    verdicts: list[Verdict]
    cautions: list[str]
    time_charts: list[charts.Chart]
    other_charts: list[charts.Chart]
    table: Table


def show(section: Section, compared: list[Against], baseline: str | None) -> Shown:
    """``compared`` is against the baseline named ``baseline``, or empty."""
    by_measure: dict[Measure, dict[int, Against]] = defaultdict(dict)
    for against in compared:
        by_measure[against.measure][id(against.row)] = against
    times, verdicts = [], []
    for measure in section.measures:
        others = by_measure[measure]
        rest = {id(row) for row in section.timed(measure)} - others.keys() if baseline else set()
        ranked = standing(section, measure)
        verdicts.append(verdict(measure, ranked, others))
        times.append(charts.time_chart(section, measure, ranked, others, rest))
    if times:  # once is enough
        times[0].bars.extend(charts.untimed(section))
    rest_of_them = [charts.roofline_chart(section, measure) for measure in section.measures]
    rest_of_them += [charts.accuracy_chart(section), charts.stage_chart(section)]
    return Shown(
        section,
        verdicts,
        cautions(section),
        times,
        [chart for chart in rest_of_them if chart],
        table(section, by_measure, baseline),
    )


def table(section: Section, compared: dict[Measure, dict[int, Against]], baseline: str | None) -> Table:
    """Every figure, one line for each row and measure."""
    several = len(section.measures) > 1
    header = [
        "strategy or rival",
        "status",
        *(["measure"] if several else []),
        "device ms (95 %)",
        "host ms",
        "roofline",
    ]
    header += ["times as fast"] if baseline else []
    header += ["error / allowed", "native attention", "engine MB", "memory GB", "build s", "remarks"]
    remarks = _Remarks()
    lines = []
    for row in section.rows:
        for i, measure in enumerate([m for m in section.measures if m in row.timings] or [None]):
            timing = row.timings[measure] if measure else None
            cells = [row.label, row.status] if i == 0 else ["", ""]  # what is of the row stands on its first line
            cells += [str(measure or "–")] if several else []
            if timing:
                time = timing.time
                cells.append(f"{number(time.median)} ({number(time.low)}–{number(time.high)})")
                cells.append(_or_dash(timing.host_ms, number))
                cells.append(_or_dash(timing.roofline_fraction, "{:.0%}".format))
            else:
                cells += ["–", "–", "–"]
            if baseline:
                against = compared[measure].get(id(row)) if measure else None
                cells.append("baseline" if measure and not against else str(against.time.inverse)
                             if against and against.time else "–")  # fmt: skip
                why = against.why if against else ""
            else:
                why = ""
            engine = _of_the_engine(row)
            cells += engine if i == 0 else [""] * len(engine)
            said = [*(timing.tainted if timing else []), why]
            said += [row.reason or "", *row.notes] if i == 0 else []
            cells.append(remarks.numbers(filter(None, said)))
            lines.append((cells, row))
    return Table(header, lines, remarks.texts())


def _of_the_engine(row: Row) -> list[str]:
    accuracy = row.accuracy
    error = "–"
    if accuracy:
        parts = [_or_dash(value, partial(number, digits=2)) for value in (accuracy.relative_error, accuracy.tolerance)]
        error = " / ".join(parts) + ("" if accuracy.executed != "graph" else " (graph)")
        error += "" if accuracy.passed else " FAILED"
    return [
        error,
        row.attention or "–",
        _or_dash(row.engine_bytes, lambda size: f"{size / 1e6:.0f}"),
        _or_dash(row.peak_bytes, lambda size: f"{size / 1e9:.1f}"),
        _or_dash(row.stages_s.get("build"), "{:.1f}".format),
    ]


def _or_dash(value: float | None, text: object) -> str:
    return "–" if value is None else text(value)  # type: ignore[operator]


class _Remarks:
    """Numbered once each; a percentage in one stands at the row that it is of."""

    def __init__(self) -> None:
        self._known: list[str] = []

    def numbers(self, remarks: Iterable[str]) -> str:
        cited = []
        for remark in remarks:
            text = re.sub(r"\d+%", "…%", remark)
            if text not in self._known:
                self._known.append(text)
            shares = ", ".join(re.findall(r"\d+%", remark))
            cited.append(str(self._known.index(text) + 1) + (f" ({shares})" if shares else ""))
        return ", ".join(dict.fromkeys(cited))

    def texts(self) -> list[str]:
        return list(self._known)


def render(
    shown: list[Shown],
    baseline: str | None = None,
    regressions: list[Against] | None = None,
    limit: float | None = None,
    unreadable: Sequence[str] = (),
    made: datetime | None = None,
) -> tuple[str, str]:
    """The HTML page and the Markdown text; ``unreadable``: why reports are left out."""
    loader = DictLoader({name: files("pipeline.compare").joinpath(name).read_text("utf-8") for name in TEMPLATES})
    environment = Environment(
        loader=loader,
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "cell": markdown.cell}
    rows = [row for one in shown for row in one.section.rows]
    context = {
        "shown": shown,
        "rows": rows,
        "timed": sum(bool(row.timings) for row in rows),
        "without": [row for row in rows if not row.timings],
        "baseline": baseline,
        "regressions": regressions,
        "limit": limit,
        "unreadable": unreadable,
        "made": (made or datetime.now()).strftime("%Y-%m-%d %H:%M"),
        "has_links": any(row.link for row in rows),
    }
    return environment.get_template("page.html").render(context), environment.get_template("page.md").render(context)
