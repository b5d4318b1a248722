"""The comparison as one HTML page and one Markdown file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files

from jinja2 import DictLoader, Environment, StrictUndefined, select_autoescape

from pipeline.compare import charts
from pipeline.compare.baseline import Against, against_reference
from pipeline.compare.curves import CurveChart, curve_chart, memory_chart
from pipeline.compare.fronts import Front, fronts
from pipeline.compare.labels import Section, cache, names, versions
from pipeline.compare.numbers import number
from pipeline.compare.questions import Sweep, single, sweeps
from pipeline.compare.remarks import Remarks, glossary
from pipeline.compare.rows import Measure, Row
from pipeline.compare.table import Table, table
from pipeline.compare.verdicts import Verdict, cautions, reference_line, standing, sweep_verdict, unsupported, verdict
from pipeline.config.axes import Axes
from pipeline.record import markdown

TEMPLATES = ("page.html", "page.md", "page.css", "page.js")


@dataclass(frozen=True)
class Question:
    """One chart, and who won."""

    anchor: str
    verdict: Verdict
    bars: charts.Chart | None
    curves: CurveChart | None


@dataclass(frozen=True)
class Shown:
    """One section as the page shows it."""

    section: Section
    anchor: str
    questions: list[Question]
    cautions: list[str]
    other_charts: list[charts.Chart]
    memory: list[CurveChart]
    fronts: list[Front]
    """What is worth having of what precisions cost."""
    table: Table
    """Ratios included, which the page has in its charts."""
    figures: Table

    @property
    def curves(self) -> list[CurveChart]:
        return [question.curves for question in self.questions if question.curves] + self.memory

    @property
    def verdicts(self) -> list[Verdict]:
        return [question.verdict for question in self.questions]


def show(section: Section, compared: list[Against], wanted: Axes | None, anchor: str, remarks: Remarks) -> Shown:
    """``compared`` is against the baseline ``wanted``; where there is none, rows are compared with the fastest that is
    none of ours (:func:`against_reference`)."""
    by_measure: dict[Measure, dict[int, Against]] = defaultdict(dict)
    for against in compared if wanted is not None else against_reference(section):
        by_measure[against.measure][id(against.row)] = against
    found = sweeps(section)
    ways = sorted({line.first.how for sweep in found for line in sweep.lines})
    alone = list(single(section, found))
    order = {(measure.kind, measure.clock): i for i, measure in reversed(list(enumerate(section.measures)))}
    asked: list[Measure | Sweep] = sorted([*alone, *found], key=lambda each: order[_kind(each)])
    questions = []
    for i, each in enumerate(asked, 1):
        place = f"{anchor}-{i}"
        if isinstance(each, Sweep):
            reference = reference_line(each, wanted)
            said = sweep_verdict(each, reference, wanted is not None)
            questions.append(Question(place, said, None, curve_chart(each, reference, ways)))
            continue
        rows, others = section.timed(each), by_measure[each]
        called = {id(row): name for row, name in zip(rows, names(rows), strict=True)}
        rest = {id(row) for row in rows} - others.keys() if others else set()
        ranked = standing(section, each)
        said = verdict(section, each, ranked, others, called, wanted is not None)
        bars = charts.time_chart(section, each, ranked, others, rest, called)
        questions.append(Question(place, said, bars, None))
    rest_of_them = [charts.accuracy_chart(section), charts.stage_chart(section)]
    return Shown(
        section,
        anchor,
        questions,
        cautions(section),
        [chart for chart in rest_of_them if chart],
        [chart for sweep in _of_different_rows(found) if (chart := memory_chart(sweep, ways))],
        list(fronts(section)),
        table(section, by_measure, None, remarks),
        table(section, {}, None, remarks),
    )


def _of_different_rows(found: list[Sweep]) -> list[Sweep]:
    """The first of those that are measures of the same runs."""
    runs = {
        frozenset(id(row) for line in sweep.lines for rows in line.points.values() for row in rows): sweep
        for sweep in reversed(found)
    }
    return [sweep for sweep in found if any(sweep is first for first in runs.values())]


def _kind(question: Measure | Sweep) -> tuple[str, str]:
    measure = question.measure if isinstance(question, Sweep) else question
    return measure.kind, measure.clock


def by_question(shown: Sequence[Shown]) -> dict[str, list[tuple[Shown, Question]]]:
    """Every question of the page, and its answer for each model."""
    found: dict[str, list[tuple[Shown, Question]]] = defaultdict(list)
    for one in shown:
        for question in one.questions:
            found[question.verdict.question].append((one, question))
    return found


def _without(section: Section) -> list[tuple[str, str, list[Row]]]:
    """Status, reason, and the rows that have no time for it."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in section.without:
        found[row.status, row.reason or ""].append(row)
    return [(status, reason, rows) for (status, reason), rows in found.items()]


def render(
    shown: list[Shown],
    remarks: Remarks,
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
    environment.filters |= {"number": number, "cell": markdown.cell, "without": _without, "unsupported": unsupported}
    rows = [row for one in shown for row in one.section.rows]
    labels = [bar.label for one in shown for q in one.questions if q.bars for bar in q.bars.bars]
    context = {
        "shown": shown,
        "answers": by_question(shown),
        "rows": rows,
        "runs": sum(row.runs for row in rows),
        "timed": sum(row.runs for row in rows if row.timings),
        "versions": versions(rows),
        "unsupported": list(dict.fromkeys(filter(None, (unsupported(one.section) for one in shown)))),
        "remarks": list(remarks),
        "glossary": glossary([*labels, *(row.label for row in rows)]),
        "caches": len({cache(row) for row in rows}) > 1,
        "baseline": baseline,
        "regressions": regressions,
        "limit": limit,
        "unreadable": unreadable,
        "made": (made or datetime.now()).strftime("%Y-%m-%d %H:%M"),
        "has_links": any(row.link for row in rows),
    }
    return environment.get_template("page.html").render(context), environment.get_template("page.md").render(context)
