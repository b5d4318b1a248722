"""How many times as fast proved native attention is as Torch-TensorRT's own engine and as torch.compile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from pipeline.compare.charts import MARGIN, Bar, Chart, Segment, ticks
from pipeline.compare.labels import Section
from pipeline.compare.numbers import number
from pipeline.compare.ratios import Ratio, ratio
from pipeline.compare.rows import Measure, Row
from pipeline.config.axes import Axes, has

OWN, COMPILE = "Torch-TensorRT's own", "torch.compile"
UPSTREAM, COMPILED = {"strategy.name": "upstream"}, {"backend.name": "torch_compile"}
PROVED = {"strategy.name": "detect_causal", "precision": "fp16"}


@dataclass(frozen=True)
class Race:
    """One thing to be done, by us and by rivals: which rows these are."""

    title: str
    kind: str
    """Of the measure: ``prefill`` or ``generate``."""
    runners: tuple[tuple[str, Axes, Axes], ...]
    """The rival's name, which rows are ours, and which are the rival's."""


def _race(title: str, kind: str, *runners: tuple[str, Axes, Axes, Axes]) -> Race:
    """Each of ``runners``: the rival's name, what is the rival's alone, and what both have, ours first."""
    return Race(title, kind, tuple((name, PROVED | ours, rival | theirs) for name, rival, ours, theirs in runners))


ANY_LENGTH, ONE_LENGTH = {"shape.kind": "dynamic"}, {"shape.kind": "static"}
NO_CACHE, STATIC_CACHE, OUR_CACHE = ({"cache.name": name} for name in ("none", "static", "in_engine"))
RACES = (
    _race(
        "A prompt, engines for every length up to it",
        "prefill",
        (OWN, UPSTREAM, ANY_LENGTH | NO_CACHE, ANY_LENGTH | NO_CACHE),
        (COMPILE, COMPILED, ANY_LENGTH | NO_CACHE, ANY_LENGTH | NO_CACHE),
    ),
    _race(
        "A prompt, engines of its one length",
        "prefill",
        (OWN, UPSTREAM, ONE_LENGTH | NO_CACHE, ONE_LENGTH | NO_CACHE),
        (COMPILE, COMPILED, ONE_LENGTH | NO_CACHE, ONE_LENGTH | NO_CACHE),
    ),
    _race(
        "Whole generation (against Torch-TensorRT's own: both without a cache)",
        "generate",
        (OWN, UPSTREAM, NO_CACHE, NO_CACHE),
        (COMPILE, COMPILED, OUR_CACHE, STATIC_CACHE),
    ),
)


@dataclass(frozen=True)
class Result:
    race: Race
    measure: Measure
    rival: str
    ours: Row
    theirs: Row
    faster: Ratio
    """The rival's time over ours, of medians of device time."""


def results(sections: Iterable[Section], kind: str) -> Iterator[Result]:
    """Every race of ``kind`` of which both rows are there; of several rows that fit, the fastest."""
    for race, section in product(RACES, sections):
        for measure in section.measures:
            if not measure.kind == race.kind == kind or measure.clock != "device_ms":
                continue
            for rival, ours, theirs in race.runners:
                here = [row for row in section.timed(measure) if has(row.axes, ours)]
                there = [row for row in section.timed(measure) if has(row.axes, theirs)]
                if here and there:
                    times = ratio([here[0].timings[measure].time], [there[0].timings[measure].time])
                    yield Result(race, measure, rival, here[0], there[0], times.inverse)


HEADER = ("what", "model", "ours", "ms", "against", "ms", "times as fast (95 %)")


def lines(found: Sequence[Result]) -> list[list[str]]:
    """Of a table with :data:`HEADER`."""
    return [
        [
            f"{each.race.title.partition(' (')[0]}, {each.measure.size}",
            _name(each),
            each.ours.label,
            number(each.ours.timings[each.measure].time.median),
            each.theirs.label,
            number(each.theirs.timings[each.measure].time.median),
            str(each.faster),
        ]
        for each in found
    ]


def charts(found: Sequence[Result]) -> list[Chart]:
    """One for each race, on one scale."""
    longest = max(each.faster.high for each in found) * MARGIN
    made = []
    for race in RACES:
        mine = [each for each in found if each.race is race]
        if not mine:
            continue
        bars = [
            Bar(
                f"{_name(each)}: {each.rival}",
                f"{each.faster.value:.2f}×",
                [Segment(0, 100 * each.faster.value / longest, CSS[each.rival], f"{each.faster}")],
                (100 * each.faster.low / longest, 100 * each.faster.high / longest),
                mark=100 / longest,
            )
            for each in sorted(mine, key=lambda each: each.ours.model)
        ]
        axis = [(100 * tick / longest, f"{tick:g}×") for tick in ticks(longest)]
        size = ", ".join(dict.fromkeys(each.measure.size for each in mine))
        made.append(Chart(f"{race.title}, {size}", "", "", bars, axis))
    return made


CSS = {OWN: "engine", COMPILE: "stage-strategy"}


def _name(each: Result) -> str:
    return each.ours.model.partition(" (")[0]
