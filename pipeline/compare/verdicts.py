"""Which row won, by how much over what, and what stands against believing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.compare.baseline import Against, disclosed, told, upstream
from pipeline.compare.labels import Section, version, versions
from pipeline.compare.numbers import number
from pipeline.compare.questions import Line, Sweep, over
from pipeline.compare.ratios import Ratio, ratio
from pipeline.compare.rows import Measure, Row
from pipeline.config.axes import Axes, has

CLOSE = 0.03  # engines of the same settings differ by a few per cent from build to build


@dataclass(frozen=True)
class Standing:
    """The rows of one measure by time."""

    leaders: list[Row]
    """The fastest, and those that are too close to it to call."""
    behind: list[tuple[Row, Ratio]]
    """The others, with their time over the fastest's."""


def standing(section: Section, measure: Measure) -> Standing:
    """A row is behind when the whole interval of its ratio to the fastest lies beyond 1 + ``CLOSE``."""
    best, *others = section.timed(measure)
    time = best.timings[measure].time
    ratios = [(row, ratio([row.timings[measure].time], [time])) for row in others]
    close = [row for row, times in ratios if times.low <= 1 + CLOSE]
    return Standing([best, *close], [(row, times) for row, times in ratios if times.low > 1 + CLOSE])


class Faster(NamedTuple):
    """How many times as fast, and as what."""

    times: str
    interval: str
    """Of 95 %, where it says more; of a sweep the sizes that the times are at."""
    other: str


@dataclass(frozen=True)
class Verdict:
    question: str
    best: str
    time: str
    faster: list[Faster]
    """Empty where there is nothing else."""
    close: str = ""
    """What stands against calling it the fastest."""
    close_short: str = ""
    """The same without names."""

    @property
    def short(self) -> str:
        """Without intervals, for two lines beside a chart that has the names."""
        parts = [f"{each.times} {'as' if i else 'as fast as'} {each.other}" for i, each in enumerate(self.faster)]
        return "; ".join(filter(None, [self.time, self.close_short, *parts]))

    @property
    def said(self) -> str:
        parts = [f"{each.times}{each.interval} as fast as {each.other}" for each in self.faster]
        return "; ".join(filter(None, [self.time, self.close, *parts]))

    def __str__(self) -> str:
        return f"{self.question}: {self.best}: {self.said}"


def _faster(ratio: Ratio, other: str) -> Faster:
    times, _, interval = ratio.short.partition(" ")
    return Faster(times, f" {interval}" if interval else "", other)


def verdict(
    section: Section, measure: Measure, ranked: Standing, compared: Mapping[int, Against], called: Mapping[int, str],
    asked: bool,
) -> Verdict:  # fmt: skip
    """``compared`` and ``called`` go by ``id`` of the row; ``asked``: whether they are compared with a baseline that
    was asked for."""
    best = ranked.leaders[0]
    said = []
    if (against := compared.get(id(best))) and against.time:
        said.append(_faster(against.time.inverse, told(best, against, called) or ""))
    own = upstream(section.timed(measure))
    if not asked and own is not None and own is not best and (against is None or own is not against.baseline):
        faster = ratio([own.timings[measure].time], [best.timings[measure].time])
        other = Against(best, measure, own.label, None, faster, baseline=own)
        said.append(_faster(faster, told(best, other, called) or ""))
    if not said and ranked.behind:
        row, times = ranked.behind[0]
        said.append(_faster(times, f"the next, {called[id(row)]}"))
    time = f"{number(best.timings[measure].time.median)} ms"
    close = [called[id(row)] for row in ranked.leaders[1:]]
    others = f"{len(close)} other{'s' if len(close) > 1 else ''}"
    texts = [f"{who} too close to call" if close else "" for who in (close[0] if len(close) == 1 else others, others)]
    return Verdict(measure.question, called[id(best)], time, said, *texts)


def reference_line(sweep: Sweep, wanted: Axes | None) -> Line | None:
    """What the lines of a sweep are compared with: the baseline that was asked for, else the rival that is the fastest
    at the largest size, else Torch-TensorRT's own engine, else the slowest."""
    lines = sweep.lines
    if wanted is not None:
        return next((line for line in lines if has(line.first.axes, wanted)), None)
    if len(lines) == 1:
        return None
    rivals = [line for line in lines if line.first.rival]
    return next(iter([*rivals, *_upstream_lines(lines), lines[-1]]))


def _upstream_lines(lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if upstream([line.first])]


def sweep_verdict(sweep: Sweep, reference: Line | None, asked: bool) -> Verdict:
    """Which line is the fastest where, and how many times as fast at both ends."""
    won: dict[str, list[int]] = {}
    for size in sweep.sizes:
        here = sorted((line for line in sweep.lines if size in line.points), key=lambda line: line.median(size))
        best = here[0]
        for line in here:
            if ratio(line.figures(size), best.figures(size)).low <= 1 + CLOSE:
                won.setdefault(line.label, []).append(size)
    often = sorted(won, key=lambda name: -len(won[name]))
    best = next(line for line in sweep.lines if line.label == often[0])
    rest = [size for size in sweep.sizes if size not in won[best.label]]
    there = [name for name in often[1:] if set(won[name]) & set(rest)]
    close = f"{' or '.join(there[:2])} at {_listed([sweep.at(size) for size in rest])}" if rest else ""
    references = [reference] if reference else []
    if not asked:
        references += [line for line in _upstream_lines(sweep.lines) if line is not reference]
    said = [each for line in references if (each := _at_the_ends(sweep, best, line))]
    ends = [size for size in sweep.sizes if size in best.points]
    time = f"{number(best.median(ends[0]))} to {number(best.median(ends[-1]))} ms"
    return Verdict(sweep.title, best.label, time, said, close, close)


def _at_the_ends(sweep: Sweep, best: Line, line: Line) -> Faster | None:
    found = [(size, faster) for size in sweep.sizes if (faster := over(best, line, size))]
    if not found:
        return None
    (first, low), (last, high) = found[0], found[-1]
    times = f"{low.value:.2f}×" + (f" to {high.value:.2f}×" if len(found) > 1 else "")
    return Faster(times, f" ({sweep.between(first, last)})", disclosed(best.first, line.first, line.label))


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(texts[:-1]) + (" and " if len(texts) > 1 else "") + texts[-1]


def unsupported(section: Section) -> str:
    """What the vendor's silence on this GPU means; empty where it supports it."""
    if not section.unsupported:
        return ""
    names = sorted({version(row, "flavour") for row in section.rows if row.environment.get("flavour")})
    return (
        f"The vendor of {', '.join(names) or 'the engines'} does not support this GPU: figures tell how rows compare, "
        "not what a supported one would reach."
    )


def cautions(section: Section) -> list[str]:
    """What the reader must know before believing any of it."""
    found = []
    timed = [row for row in section.rows if row.timings]
    unverified = [row for row in timed if row.accuracy is None or not row.accuracy.passed]
    if timed and not unverified:
        found.append("Every timed row passed its verification.")
    mixed = [f"{key} {', '.join(values)}" for key, values in versions(timed) if len(values) > 1 and key != "git"]
    if mixed:
        found.append(f"Not all rows ran on the same versions: {'; '.join(mixed)}.")
    return found
