"""Rows as lines of Markdown tables: what they are called, what is remarked, and what is said once for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.before import Before, earlier
from benchmarks.stacks import is_older, stack_of, versions
from benchmarks.ways import Row, at
from pipeline.compare.numbers import number
from pipeline.compare.rows import Figure
from pipeline.record import markdown

OLDER = "older code"
SAID_ONCE = {
    "power-limited": "The card's power cap held clocks back in every row.",
    "launch-bound": "The host's launches bound every row.",
    "times drifted": "Times drifted in every row.",
    OLDER: "Every row was measured by older code than this.",
}


class Shown:
    """The rows of one table."""

    def __init__(self, rows: Sequence[Row], environment: Mapping[str, Any]) -> None:
        self._rows = rows
        self._environment = environment
        self._ways = {row.way for row in rows}
        remarked = [set(self._doubts(row)) for row in rows if row.time]
        self._all = set.intersection(*remarked) if len(remarked) > 1 else set()

    @property
    def above(self) -> str:
        """What all rows carry, to follow what stands over the table; empty where there is no such thing."""
        said = [text for word, text in SAID_ONCE.items() if word in self._all]
        said += [f"Of every row: {word}." for word in sorted(self._all) if word not in SAID_ONCE]
        return "".join(f" {text}" for text in said)

    @property
    def below(self) -> str:
        """How an older stack did what is done here again; nothing where it did none of it."""
        return "".join(f"\n{line}\n" for line in self._before())

    def label(self, row: Row) -> str:
        return row.way.label(row.task.kind, self._ways)

    def remarks(self, row: Row) -> str:
        """What is said of this row and not of all, or why it has no time."""
        if row.time is None:
            return markdown.cell(_reason(row.report)) + self._elsewhere(row)
        said = [word for word in self._doubts(row) if word not in self._all]
        if len(row.figures) > 1:
            said.append(f"{len(row.figures)} processes")
        return markdown.cell(", ".join(said)) + self._elsewhere(row)

    def _before(self) -> Iterator[str]:
        here = stack_of(self._environment).title if self._environment.get("tensorrt") else ""
        for stack, found in earlier().items():
            again = [(row, found[row.task, row.way]) for row in self._rows if row.time and (row.task, row.way) in found]
            if again and stack != here:
                yield f"{stack}, ms then → now: {'; '.join(self._change(*each) for each in again)}."

    def _change(self, row: Row, was: Before) -> str:
        assert row.time
        return f"{self.label(row)} {number(was.ms)} → {number(row.time.median)}"

    def _doubts(self, row: Row) -> list[str]:
        said = list(row.taints)
        if count := sum(len(form["layers"]) for form in at(row.report, "engine", "unfused") or ()):
            said.append(f"{counted(count, 'attention layer', 'attention layers')} without a fused kernel")
        if any(is_older(each.report["environment"]) for each in row.found):
            said.append(OLDER)
        return said

    def _elsewhere(self, row: Row) -> str:
        """What a row ran on, where that is not what stands over the table."""
        own = row.report["environment"] or {}
        if all(own.get(key) in (None, self._environment.get(key)) for key in ("flavour", "tensorrt", "torch")):
            return ""
        return f" ({versions(own)}{'' if own.get('gpu') else ', without a GPU'})"


def _reason(report: Mapping[str, Any]) -> str:
    if report["failure"]:
        return "{kind}: {message}".format(**report["failure"])
    return f"{report['status']}: {report['unavailable']}" if report["unavailable"] else str(report["status"])


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Of cells that are Markdown already."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def ms(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def times_of(time: Figure | None) -> str:
    """A median with its interval, in ms."""
    if time is None:
        return "–"
    digits = 3 if number(time.low) != number(time.high) else 4
    return "{} ({}–{})".format(*(number(each, digits) for each in (time.median, time.low, time.high)))


def counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"
