"""How many times as fast ours is as what one would use instead: which rows race, a table, and bars for a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from benchmarks.shown import table, times_of
from benchmarks.ways import Row, Task, faster
from pipeline.compare.charts import MARGIN, Bar, Chart, Segment, ticks
from pipeline.compare.ratios import Ratio

Chosen = Mapping[str, str]
"""Fields of a :class:`benchmarks.ways.Way`, and what they are."""


@dataclass(frozen=True)
class Race:
    """One thing to be done, by us and by rivals; of several rows that fit, the fastest runs."""

    title: str
    kind: str
    """Of the task: ``prefill`` or ``generate``."""
    ours: Chosen
    rivals: Mapping[str, Chosen]
    """By the name that a reader knows them by."""


OURS = {"backend": "tensorrt", "strategy": "detect_causal", "precision": "fp16"}
UPSTREAM = {"backend": "tensorrt", "strategy": "upstream", "precision": "fp16"}
EAGER, COMPILED = {"backend": "eager", "precision": "fp16"}, {"backend": "torch_compile", "precision": "fp16"}
ONE, EVERY = {"lengths": "one"}, {"lengths": "every"}
NO_CACHE, DYNAMIC, STATIC = ({"cache": name} for name in ("none", "dynamic", "static"))
GENERATION = Race(
    "Whole generation, our fastest cache",
    "generate",
    OURS,
    {
        "torch.compile, static cache": COMPILED | STATIC,
        "PyTorch eager, its default cache": EAGER | DYNAMIC,
        "PyTorch eager, no cache": EAGER | NO_CACHE,
        "Torch-TensorRT as it ships, no cache": UPSTREAM | NO_CACHE,
    },
)
RACES = (
    GENERATION,
    Race(
        "Whole generation, no cache on either side",
        "generate",
        OURS | NO_CACHE,
        {
            "torch.compile, no cache": COMPILED | NO_CACHE,
            "PyTorch eager, no cache": EAGER | NO_CACHE,
            "Torch-TensorRT as it ships, no cache": UPSTREAM | NO_CACHE,
        },
    ),
    Race(
        "A prompt, one engine for every length up to it",
        "prefill",
        OURS | EVERY,
        {
            "Torch-TensorRT as it ships, one engine for every length": UPSTREAM | EVERY,
            "torch.compile, compiled for the one length": COMPILED | ONE,
        },
    ),
    Race(
        "A prompt, an engine of its one length",
        "prefill",
        OURS | ONE,
        {
            "Torch-TensorRT as it ships, one length": UPSTREAM | ONE,
            "ours with the mask handed over": OURS | ONE | {"strategy": "mask_input"},
            "torch.compile, compiled for the one length": COMPILED | ONE,
            "PyTorch eager": EAGER | ONE,
        },
    ),
)


@dataclass(frozen=True)
class Result:
    race: Race
    task: Task
    rival: str
    ours: Row
    theirs: Row
    faster: Ratio
    """The rival's device time over ours, of medians."""


def results(rows: Iterable[Row], batch: int = 1) -> Iterator[Result]:
    """Every race of which both rows are there and timed."""
    tasks = {task: list(group) for task, group in groupby(rows, lambda row: row.task)}
    for race in RACES:
        for task, here in tasks.items():
            if task.kind != race.kind or task.batch != batch or (ours := _fastest(here, race.ours)) is None:
                continue
            for name, chosen in race.rivals.items():
                if (theirs := _fastest(here, chosen)) is not None:
                    yield Result(race, task, name, ours, theirs, faster(ours, theirs))


def _fastest(rows: Iterable[Row], chosen: Chosen) -> Row | None:
    """The first that fits, since rows come fastest first: of ours as one gets it without asking for more, of a rival
    its best."""
    fit = (row for row in rows if all(getattr(row.way, key) == value for key, value in chosen.items()))
    return next((row for row in fit if row.time and not (row.way.is_ours and row.way.options)), None)


def table_of(race: Race, found: Sequence[Result]) -> str:
    """Of one race: a row for each task, a column for each rival that was there."""
    names = [name for name in race.rivals if any(each.rival == name for each in found)]
    lines = []
    for task, group in groupby(found, lambda each: each.task):
        against = {each.rival: each for each in group}
        ours = next(iter(against.values())).ours
        ratios = (str(against[name].faster) if name in against else "–" for name in names)
        lines.append([f"{task.model}, {task.size}", ours.way.label(task.kind), times_of(ours.time), *ratios])
    return table(("what", "ours", "ms (95 %)", *(f"times as fast as {name}" for name in names)), lines)


def charts(found: Sequence[Result]) -> list[Chart]:
    """How many times as fast, one chart for each task of one race, on one scale."""
    longest = max(each.faster.high for each in found) * MARGIN
    axis = [(100 * tick / longest, f"{tick:g}×") for tick in ticks(longest)]
    made = []
    for task, group in groupby(found, lambda each: each.task):
        bars = [
            Bar(
                each.rival,
                f"{each.faster.value:.2f}×" if each.faster.value < 10 else f"{each.faster.value:.1f}×",
                [Segment(0, 100 * each.faster.value / longest, css_of(each.theirs), str(each.faster))],
                (100 * each.faster.low / longest, 100 * each.faster.high / longest),
                mark=100 / longest,
            )
            for each in group
        ]
        made.append(Chart(f"{task.model}: so many times as fast as …", "", "", bars, axis))
    return made


def time_charts(found: Sequence[Result]) -> list[Chart]:
    """What each of them takes, one chart for each task of one race, with the least that the card needs."""
    made = []
    for task, group in groupby(found, lambda each: each.task):
        results_ = list(group)
        ours = results_[0].ours
        named = [(f"ours, {ours.way.label(task.kind).partition(', ')[2]}", ours)]
        named += [(each.rival, each.theirs) for each in results_]
        longest = max(row.time.high for _, row in named if row.time) * MARGIN
        bars = []
        for name, row in sorted(named, key=lambda each: each[1].time.median if each[1].time else 0):
            assert row.time
            floor = row.median("generate", "floor_ms") if row is ours else None
            width = 100 * row.time.median / longest
            css = "fastest" if row is ours else css_of(row)
            bars.append(
                Bar(
                    name,
                    f"{row.time.median:.0f} ms",
                    [Segment(0, width, css, f"{name}: {times_of(row.time)} ms")],
                    (100 * row.time.low / longest, 100 * row.time.high / longest),
                    None if floor is None else 100 * floor / longest,
                )
            )
        axis = [(100 * tick / longest, f"{tick:g}") for tick in ticks(longest)]
        made.append(Chart(f"{task.model}, {task.size}", "", "", bars, axis))
    return made


def css_of(row: Row) -> str:
    return {"torch_compile": "stage-strategy", "eager": "rival"}.get(row.way.backend, "engine")
