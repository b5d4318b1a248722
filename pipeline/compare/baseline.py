"""Which row is compared with which: with a named baseline of the same sweep, or with an earlier set of reports."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from passes.errors import UserError
from pipeline.compare.labels import Section, cache
from pipeline.compare.ratios import Ratio, ratio
from pipeline.compare.rows import Measure, Row
from pipeline.config.axes import Axes, has, parse

MUST_AGREE = ("precision", "model.", "shape.batch")  # or the two rows do different work
SAME_WORK = ("cache.", "model.inputs")  # or one of them gets the same result by another way
HOW = ("strategy.", "backend.")
UPSTREAM = {"strategy.name": "upstream"}


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
    baseline: Row | None = None
    """The row that ``other`` names, where it is one of the same section."""
    same_work: bool = True
    """Whether the two also agree in cache and call form, so that nothing but the baseline's own settings differs."""

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
    """Every timed row of ``section`` against the baseline row that does the same work, else against the fastest that
    does it with another cache or call form.

    A baseline agrees in precision and batch, except where the baseline itself is named by them; of several, the one
    that shares most other settings is taken.
    """
    found = []
    for measure in section.measures:
        baselines = [row for row in section.timed(measure) if has(row.axes, wanted)]
        for row in section.timed(measure):
            if any(row is other for other in baselines):
                continue
            chosen, same, why = _choose(row, baselines, wanted)
            found.append(_compare(row, measure, chosen, chosen[0].label if chosen else "", why, same_work=same))
    return found


def against_reference(section: Section) -> list[Against]:
    """Every timed row against the fastest that is none of ours: of the rivals, else of Torch-TensorRT's own engines,
    else against the slowest row.  What the page compares with where no baseline is asked for."""
    found = []
    for measure in section.measures:
        rows = section.timed(measure)
        reference = next(iter([*filter(_is_rival, rows), *filter(_is_upstream, rows), rows[-1]]))
        found += [
            _compare(row, measure, [reference], reference.label, same_work=_same_work(row, reference))
            for row in rows
            if row is not reference
        ]
    return found


def _is_rival(row: Row) -> bool:
    return row.rival is not None


def _is_upstream(row: Row) -> bool:
    return has(row.axes, UPSTREAM)


def upstream(rows: Iterable[Row]) -> Row | None:
    """The first of ``rows`` that is Torch-TensorRT's own engine."""
    return next(filter(_is_upstream, rows), None)


def _same_work(row: Row, other: Row) -> bool:
    keys = row.axes.keys() | other.axes.keys()
    return all(row.axes.get(key) == other.axes.get(key) for key in keys if key.startswith(SAME_WORK))


def _choose(row: Row, baselines: list[Row], wanted: Axes) -> tuple[list[Row], bool, str]:
    """The rows of ``baselines`` (the fastest first) to compare ``row`` with, whether they do the same work, and why
    there are none."""

    def free(key: str) -> bool:
        groups = {name.partition(".")[0] + "." for name in wanted}
        return key in wanted or key.startswith((*groups, *HOW))

    def differing(other: Row) -> list[str]:
        keys = row.axes.keys() | other.axes.keys()
        return [key for key in keys if not free(key) and row.axes.get(key) != other.axes.get(key)]

    fitting = [(differing(other), other) for other in baselines]
    fitting = [(keys, other) for keys, other in fitting if not any(_forbids(key) for key in keys)]
    if not fitting:
        return [], False, "no baseline of the same precision and batch; --baseline AXIS:VALUE,precision:VALUE names one"
    same = [(keys, other) for keys, other in fitting if not any(key.startswith(SAME_WORK) for key in keys)]
    if not same:  # the strictest of them, and named: it is not for us to say which of the others was meant
        return [fitting[0][1]], False, ""
    least = min(len(keys) for keys, _ in same)
    best = [other for keys, other in same if len(keys) == least]
    if any(other.axes != best[0].axes for other in best):
        return [], False, f"several baselines fit ({', '.join(other.label for other in best)}); name more axes"
    return best, True, ""


def _forbids(key: str) -> bool:
    return key.startswith(MUST_AGREE) and not key.startswith(SAME_WORK)


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
    row: Row, measure: Measure, others: list[Row], label: str, why: str = "", numerators: list[Row] | None = None,
    same_work: bool = True,
) -> Against:  # fmt: skip
    if not others:
        return Against(row, measure, label, None, None, why, same_work=same_work)
    before = [other.timings[measure].time for other in others]
    time = ratio([each.timings[measure].time for each in numerators or [row]], before)
    return Against(row, measure, label, before[0].median, time, "", others[0], same_work)


def told(row: Row, against: Against | None, called: Mapping[int, str]) -> str | None:
    """What ``row`` is compared with, by its name among these rows."""
    if against is None or against.time is None:
        return None
    other = against.baseline
    return disclosed(row, other, called.get(id(other), other.label)) if other else against.other


def baselines(rows: Iterable[Row], compared: Mapping[int, Against], called: Mapping[int, str]) -> list[str]:
    """The names of what ``rows`` are compared with, each once; with its cache where some row has another."""
    found: dict[int, str] = {}
    for row in rows:
        against = compared.get(id(row))
        if name := told(row, against, called):
            place = id(against and against.baseline)
            found[place] = max(found.get(place, ""), name, key=len)
    return list(found.values())


def disclosed(row: Row, other: Row, name: str) -> str:
    """``name`` of ``other`` beside ``row``: that it has another cache is never left unsaid."""
    return name if cache(row) == cache(other) or cache(other) in name else f"{name} ({cache(other)})"
