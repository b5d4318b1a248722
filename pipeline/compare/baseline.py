"""Which row is compared with which: with a named baseline of the same sweep, or with an earlier set of reports."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from passes.errors import UserError
from pipeline.compare.labels import Section
from pipeline.compare.ratios import Ratio, ratio
from pipeline.compare.rows import Measure, Row
from pipeline.config.axes import Axes, has, parse

MUST_AGREE = ("precision", "cache.", "model.", "shape.batch")  # or the two rows do different work
HOW = ("strategy.", "backend.")


@dataclass(frozen=True)
class Against:
    """One row's time, against another's of the same measure."""

    row: Row
    measure: Measure
    other: str
    """What it is compared with."""
    before_ms: float | None
    time: Ratio | None
    """This row's time over the other's; None where one of them has none, and ``why`` says so."""
    why: str = ""

    def slower(self, limit: float = 0.0) -> bool:
        """Whether the whole interval lies beyond ``1 + limit``, or nothing is left to compare."""
        return self.why.startswith("failed") if self.time is None else self.time.low > 1 + limit

    def verdict(self, limit: float = 0.0) -> str:
        if self.time is None:
            return self.why
        if self.slower(limit):
            return "slower"
        if self.time.high < 1:
            return "faster"
        return "slower, within the limit" if self.time.low > 1 else "no difference"


def parse_baseline(text: str, rows: list[Row]) -> Axes:
    """``--baseline``, in the grammar of :mod:`pipeline.config.axes`, as axes that at least one of ``rows`` has."""
    unset = {key for row in rows for key in row.known}
    return parse(text, "--baseline ", "axis", [row.axes for row in rows], unset, "report")


def against_baseline(section: Section, wanted: Axes) -> list[Against]:
    """Every timed row of ``section`` against the baseline row that does the same work.

    A baseline agrees in precision, cache, call form and batch, except where the baseline itself is named by them;
    of several, the one that shares most other settings is taken.
    """
    found = []
    for measure in section.measures:
        baselines = [row for row in section.timed(measure) if has(row.axes, wanted)]
        for row in section.timed(measure):
            if any(row is other for other in baselines):
                continue
            chosen, why = _choose(row, baselines, wanted)
            found.append(_compare(row, measure, chosen, chosen[0].label if chosen else "", why))
    return found


def _choose(row: Row, baselines: list[Row], wanted: Axes) -> tuple[list[Row], str]:
    def free(key: str) -> bool:
        groups = {name.partition(".")[0] + "." for name in wanted}
        return key in wanted or key.startswith((*groups, *HOW))

    def differing(other: Row) -> list[str]:
        keys = row.axes.keys() | other.axes.keys()
        return [key for key in keys if not free(key) and row.axes.get(key) != other.axes.get(key)]

    fitting = [(differing(other), other) for other in baselines]
    fitting = [(keys, other) for keys, other in fitting if not any(key.startswith(MUST_AGREE) for key in keys)]
    if not fitting:
        return (
            [],
            "no baseline of the same precision, cache, call form and batch; --baseline AXIS:VALUE,cache:none names one",
        )
    least = min(len(keys) for keys, _ in fitting)
    best = [other for keys, other in fitting if len(keys) == least]
    if any(other.axes != best[0].axes for other in best):
        return [], f"several baselines fit ({', '.join(other.label for other in best)}); name more axes"
    return best, ""


def against_earlier(now: list[Row], before: list[Row]) -> list[Against]:
    """Every row of ``now`` against the row of ``before`` with the same settings and GPU; repetitions are pooled.

    Settings that only one of the two sets knows, because the other is older, are left out.  Raises
    :class:`UserError` where no two rows match.
    """
    shared = {key for row in now for key in row.known} & {key for row in before for key in row.known}
    earlier_rows = _groups(before, shared)
    found, matched = [], set()
    for rows in _groups(now, {key for row in now for key in row.known}).values():
        key = _key(rows[0], shared)
        matched.add(key)
        earlier = earlier_rows.get(key, [])
        for measure in dict.fromkeys(measure for row in earlier for measure in row.timings):
            there = [row for row in earlier if measure in row.timings]
            here = [row for row in rows if measure in row.timings]
            if here:
                found.append(_compare(here[0], measure, there, there[0].label, numerators=here))
                continue
            failed = next((row for row in rows if row.status == "failed"), None)
            why = f"failed: {failed.reason}" if failed else f"not timed: {rows[0].reason or 'another benchmark'}"
            before_ms = there[0].timings[measure].time.median
            found.append(Against(failed or rows[0], measure, there[0].label, before_ms, None, why))
    if not found:
        raise UserError("--against: no timed row there has the settings and the GPU of one here; nothing to compare")
    for key, rows in earlier_rows.items():
        if key not in matched:
            found += [
                Against(rows[0], measure, rows[0].label, timing.time.median, None, "was not run again")
                for measure, timing in rows[0].timings.items()
            ]
    return found


Key = tuple[object, ...]


def _groups(rows: Iterable[Row], keys: set[str]) -> dict[Key, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[_key(row, keys)].append(row)
    return groups


def _key(row: Row, keys: set[str]) -> Key:
    return row.model, row.gpu, tuple(sorted((key, value) for key, value in row.axes.items() if key in keys))


def _compare(
    row: Row, measure: Measure, others: list[Row], label: str, why: str = "", numerators: list[Row] | None = None
) -> Against:
    if not others:
        return Against(row, measure, label, None, None, why)
    before = [other.timings[measure].time for other in others]
    time = ratio([each.timings[measure].time for each in numerators or [row]], before)
    return Against(row, measure, label, before[0].median, time)
