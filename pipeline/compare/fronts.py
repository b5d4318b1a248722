"""What is worth having: quality against time and against bytes, and the rows that nothing beats in both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.compare.charts import ticks
from pipeline.compare.labels import Section, names, shared
from pipeline.compare.numbers import number
from pipeline.compare.rows import Cost, Measure, Row

ROOM = 0.06
"""Of the plot's width and height, beyond the outermost points."""


_PRICES = {"tpot_ms": "ms a token", "device_ms": "ms a prompt"}
"""By the clock of a measure."""


@dataclass(frozen=True)
class Point:
    """One row; places in per cent, from the left and from the top."""

    label: str
    x: float
    y: float
    low: float
    """Of the interval of its quality; ``high`` likewise."""
    high: float
    worth: bool
    """No row is both cheaper and better: it lies on the front."""
    css: str
    tip: str
    cells: tuple[str, str, str]
    """Its price, its perplexity beside the unquantised model's, and the rise."""


@dataclass(frozen=True)
class Front:
    title: str
    unit: str
    price: str
    """What the price is, for the head of the table."""
    points: list[Point]
    """The cheapest first."""
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    note: str

    @property
    def steps(self) -> list[tuple[float, float]]:
        """The corners of the line through the front: what it costs to be better."""
        worth = [point for point in self.points if point.worth]
        corners: list[tuple[float, float]] = []
        for point in worth:
            corners += [(point.x, corners[-1][1])] if corners else []
            corners.append((point.x, point.y))
        return corners

    @property
    def verdict(self) -> str:
        """Which rows are worth having, for what price and what rise."""
        worth = [point for point in self.points if point.worth]
        return "; ".join(f"{point.label}, {point.cells[0]}, {point.cells[2].partition(' (')[0]}" for point in worth)


def fronts(section: Section) -> Iterator[Front]:
    """Against the time of a token, or of a prompt where nothing was generated, and against the engine's bytes; where
    two rows or more have both.  Rows that were measured on another text than most are left out, and counted."""
    texts = Counter(row.cost.text for row in section.rows if row.cost)
    if not texts:
        return
    ((text, _),) = texts.most_common(1)
    rows = [row for row in section.rows if row.cost and row.cost.text == text]
    others = sum(texts.values()) - len(rows)
    for measure in _measures(section):
        timed = [row for row in rows if measure in row.timings]
        yield from _front(
            f"Quality against {_asked(measure)}", _PRICES[measure.clock], timed, partial(_time, measure), others
        )
    yield from _front("Quality against bytes", "MB", rows, _megabytes, others)


def _time(measure: Measure, row: Row) -> float:
    return row.timings[measure].time.median


def _megabytes(row: Row) -> float:
    return (row.bytes or 0) / 1e6


def _measures(section: Section) -> list[Measure]:
    """Each token of every generation, and the prompt that most rows have."""
    tokens = [measure for measure in section.measures if measure.clock == "tpot_ms"]
    prompts = [measure for measure in section.measures if measure.kind == "prefill"]
    return tokens + sorted(prompts, key=lambda each: -len(section.timed(each)))[:1]


def _asked(measure: Measure) -> str:
    return f"the {measure.what}, {measure.size}"


def _front(title: str, name: str, rows: Sequence[Row], price: Callable[[Row], float], others: int) -> Iterator[Front]:
    """``name``: of the price, which begins with its unit."""
    priced = sorted((row for row in rows if price(row) > 0), key=price)
    if len(priced) < 2:
        return
    costs = [_cost(row) for row in priced]
    worth = on_front([price(row) for row in priced], [cost.increase for cost in costs], [cost.passed for cost in costs])
    rises = [100 * end for cost in costs for end in (cost.increase, cost.low, cost.high)]
    low, high = min(0.0, *rises), max(0.0, *rises) or 1.0
    low, high = low - ROOM * (high - low), high + ROOM * (high - low)
    most = price(priced[-1]) * (1 + ROOM)

    def y(rise: float) -> float:
        return 100 * (high - rise) / (high - low)

    points, unit = [], name.partition(" ")[0]
    for row, cost, label, is_worth in zip(priced, costs, names(priced), worth, strict=True):
        cells = (f"{number(price(row))} {unit}", f"{number(cost.perplexity)} / {number(cost.reference)}", percent(cost))
        tip = f"{label}: {cells[0]}; perplexity {cells[1]}, {cells[2]}, over {cost.tokens} tokens"
        css = "bad" if not cost.passed else "fastest" if is_worth else "rival" if row.rival else "engine"
        x, at, ends = 100 * price(row) / most, y(100 * cost.increase), (y(100 * cost.low), y(100 * cost.high))
        points.append(Point(label, x, at, *ends, is_worth, css, tip, cells))
    note = "Line: what nothing beats in both. Whisker: 95 % interval; the unquantised model is at 0."
    note += f" Left out, since they were measured on another text: {others}." if others else ""
    yield Front(
        title,
        ", ".join([f"rise of perplexity in %, over {name}", *shared(priced)]),
        name,
        points,
        [(100 * tick / most, f"{tick:g}") for tick in ticks(most)],
        [(y(tick), f"{tick:g}") for tick in _around_nothing(low, high)],
        note,
    )


def on_front(prices: Sequence[float], rises: Sequence[float], passed: Sequence[bool]) -> list[bool]:
    """Of rows in the order of their ``prices``, which are cheaper than every one that is as good; of two at one price
    the better.  A row that did not pass is worth nothing."""
    best = math.inf
    found = [False] * len(prices)
    for i in sorted(range(len(prices)), key=lambda each: (prices[each], rises[each])):
        if passed[i] and rises[i] < best:
            best, found[i] = rises[i], True
    return found


def percent(cost: Cost) -> str:
    """The rise with its interval."""
    return f"{100 * cost.increase:+.2f} % ({100 * cost.low:+.2f} to {100 * cost.high:+.2f})"


def _cost(row: Row) -> Cost:
    assert row.cost is not None
    return row.cost


def _around_nothing(low: float, high: float) -> list[float]:
    """Round numbers from ``low``, which is 0 or below, to ``high``, which is 0 or above."""
    marks = ticks(max(high, -low))
    return sorted({tick for mark in marks for tick in (mark, -mark) if low <= tick <= high})
