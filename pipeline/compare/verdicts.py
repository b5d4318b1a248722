"""Which row won, by how much, and what stands against believing it."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.compare.baseline import Against
from pipeline.compare.labels import Section
from pipeline.compare.numbers import number
from pipeline.compare.ratios import Ratio, ratio
from pipeline.compare.rows import Measure, Row

CLOSE = 0.03  # engines of the same settings differ by a few per cent from build to build


@dataclass(frozen=True)
class Standing:
    """The rows of one measure by time."""

    leaders: list[Row]
    """The fastest, and those that are too close to it to call."""
    behind: list[tuple[Row, Ratio]]
    """The others, with their time over the fastest's."""


@dataclass(frozen=True)
class Verdict:
    measure: Measure
    leaders: str
    said: str

    def __str__(self) -> str:
        return f"{self.measure}: {self.leaders} {self.said}"


def standing(section: Section, measure: Measure) -> Standing:
    """A row is behind when the whole interval of its ratio to the fastest lies beyond 1 + ``CLOSE``."""
    best, *others = section.timed(measure)
    time = best.timings[measure].time
    ratios = [(row, ratio([row.timings[measure].time], [time])) for row in others]
    close = [row for row, times in ratios if times.low <= 1 + CLOSE]
    return Standing([best, *close], [(row, times) for row, times in ratios if times.low > 1 + CLOSE])


def verdict(measure: Measure, ranked: Standing, compared: dict[int, Against]) -> Verdict:
    """Which row won and by how much, in a sentence or two; ``compared`` goes by ``id`` of the row."""
    best, *close = ranked.leaders
    time = f"{number(best.timings[measure].time.median)} ms"
    leaders = ", ".join(row.label for row in ranked.leaders[:-1])
    leaders = f"{leaders} and {ranked.leaders[-1].label}" if close else best.label
    if close:
        said = f"are too close to call, at {time}."
    elif ranked.behind:
        said = f"is the fastest, at {time}."
    else:
        said = f"takes {time}; nothing to compare it with."
    if ranked.behind:
        row, times = ranked.behind[0]
        said += f" Next: {row.label}, {times} times as long."
    if (against := compared.get(id(best))) and against.time:
        said += f" {best.label} is {against.time.inverse} times as fast as {against.other}."
    return Verdict(measure, leaders, said)


def cautions(section: Section) -> list[str]:
    """What the reader must know before believing any of it."""
    found = []
    if section.unsupported:
        names = sorted({str(row.environment.get("flavour") or "the vendor") for row in section.rows})
        found.append(
            f"The vendor of {', '.join(names)} does not support this GPU: these figures tell how the rows compare, "
            "not what a supported GPU would reach."
        )
    timed = [row for row in section.rows if row.timings]
    tainted = [row for row in timed if any(timing.tainted for timing in row.timings.values())]
    if tainted:
        found.append(f"{len(tainted)} of {len(timed)} timed rows are tainted (⚠): the remarks below say by what.")
    unverified = [row for row in timed if row.accuracy is None or not row.accuracy.passed]
    if timed and not unverified:
        found.append("Every timed row passed its verification.")
    if mixed := [f"{key} {', '.join(values)}" for key, values in section.versions if len(values) > 1]:
        found.append(f"Not all rows ran on the same versions: {'; '.join(mixed)}.")
    if len(timed) > 1:
        found.append(
            "An interval speaks of one process and one build; builds of the same settings differ by a few per cent."
        )
    return found
