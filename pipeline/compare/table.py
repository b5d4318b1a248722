"""Every figure of a section: a line for each row and size of work, a column for each thing that was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from pipeline.compare.baseline import Against, baselines, told
from pipeline.compare.fronts import percent
from pipeline.compare.labels import Section
from pipeline.compare.numbers import number
from pipeline.compare.remarks import Remarks
from pipeline.compare.rows import Cost, Measure, Row

Compared = Mapping[Measure, Mapping[int, Against]]
"""Measure -> ``id`` of a row -> what it is compared with."""
TIMES = {
    ("prefill", "device_ms"): "prompt, ms (95 %)",
    ("generate", "device_ms"): "generation, ms (95 %)",
    ("generate", "ttft_ms"): "first token, ms",
    ("generate", "tpot_ms"): "each token, ms",
}


@dataclass(frozen=True)
class Table:
    header: list[str]
    lines: list[tuple[list[str], Row]]
    """The cells of a row; its link and its status are the row's own."""
    remarks: list[str]
    """What the words of the last column mean."""


def table(section: Section, compared: Compared, baseline: str | None, remarks: Remarks | None = None) -> Table:
    """With how many times as fast rows are, where they are compared.  Rows that have neither a time nor anything else
    that can be compared are left to the list of those without.

    ``remarks``: where the words of the last column are collected, for several tables.
    """
    remarks = remarks or Remarks()
    sizes = {size for row in section.rows for size in _sizes(row)}
    kinds = [kind for kind in TIMES if any((m.kind, m.clock) == kind for m in section.measures)]
    wholes = [kind for kind in kinds if kind[1] == "device_ms"]
    over = {kind: _over(section, compared, kind) for kind in wholes} if compared or baseline else {}
    header = ["row", *(["tokens"] if len(sizes) > 1 else [])]
    for kind in kinds:
        header += [TIMES[kind], *([_faster(over[kind])] if kind in over else [])]
    both = " / ".join({"prefill": "prompt", "generate": "generation"}[kind] for kind, _ in wholes)
    header += [f"{name}{f', {both}' if len(wholes) > 1 else ''}" for name in ("host ms", "roofline")] if wholes else []
    costs = any(row.cost for row in section.rows)
    header += [
        "error / allowed",
        *(["perplexity"] if costs else []),
        "native attention",
        "engine MB",
        "memory GB",
        "build s",
        "remarks",
    ]
    lines = []
    for row in section.rows:
        if not row.timings and row.accuracy is None and row.attention is None:
            continue
        for i, size in enumerate(_sizes(row) or [None]):
            here = {(m.kind, m.clock): m for m in row.timings if size is not None and _size(m) == size}
            cells = [row.label, *([_written(size, here)] if len(sizes) > 1 else [])]
            for kind in kinds:
                cells.append(_time(row, here.get(kind), kind[1] == "device_ms"))
                if kind in over:
                    cells.append(_ratio(row, here.get(kind), compared, baseline, over[kind]))
            timings = [row.timings[here[kind]] if kind in here else None for kind in wholes]
            if timings:
                cells.append(_together(_or_dash(each.host_ms if each else None, number) for each in timings))
                shares = [each.roofline_fraction if each else None for each in timings]
                cells.append(_together(_or_dash(share, "{:.0%}".format) for share in shares))
            cells += _of_the_engine(row, costs)
            taints = [taint for measure in here.values() for taint in row.timings[measure].tainted]
            whys = [against.why for m in here.values() if (against := compared.get(m, {}).get(id(row))) and against.why]
            cells.append(remarks.words(dict.fromkeys(taints), [*dict.fromkeys(whys), *(row.notes if i == 0 else [])]))
            lines.append((cells, row))
    return Table(header, lines, remarks.texts())


def _size(measure: Measure) -> tuple[int, int]:
    return measure.batch, measure.input_length


def _sizes(row: Row) -> list[tuple[int, int]]:
    return sorted({_size(measure) for measure in row.timings})


def _written(size: tuple[int, int] | None, here: Mapping[tuple[str, str], Measure]) -> str:
    if size is None:
        return "–"
    out = max(measure.output_length for measure in here.values())
    length = f"{size[1]} + {out}" if out else f"{size[1]}"
    return length if size[0] == 1 else f"{length}, batch {size[0]}"


def _over(section: Section, compared: Compared, kind: tuple[str, str]) -> set[str]:
    """The names of what rows are compared with in a column."""
    measures = [measure for measure in section.measures if (measure.kind, measure.clock) == kind]
    return {name for m in measures for name in baselines(section.timed(m), compared.get(m, {}), {})}


def _faster(names: set[str]) -> str:
    return f"times as fast as {next(iter(names))}" if len(names) == 1 else "times as fast as"


def _time(row: Row, measure: Measure | None, interval: bool) -> str:
    if measure is None:
        return "–"
    time = row.timings[measure].time
    return f"{number(time.median)} ({number(time.low)}–{number(time.high)})" if interval else number(time.median)


def _ratio(row: Row, measure: Measure | None, compared: Compared, baseline: str | None, names: set[str]) -> str:
    if measure is None:
        return "–"
    against = compared.get(measure, {}).get(id(row))
    if against is None:
        return "baseline"
    if against.time is None:
        return "–"
    return against.time.inverse.short + (f" {told(row, against, {})}" if len(names) > 1 else "")


def _of_the_engine(row: Row, costs: bool) -> list[str]:
    """``costs``: whether some row has what its precision cost."""
    accuracy = row.accuracy
    error = "–"
    if accuracy:
        parts = [_or_dash(value, partial(number, digits=2)) for value in (accuracy.relative_error, accuracy.tolerance)]
        error = " / ".join(parts) + ("" if accuracy.executed != "graph" else " (graph)")
        error += "" if accuracy.passed else " FAILED"
    return [
        error,
        *([_perplexity(row.cost)] if costs else []),
        row.attention or "–",
        _or_dash(row.engine_bytes, lambda size: f"{size / 1e6:.0f}"),
        _or_dash(row.peak_bytes, lambda size: f"{size / 1e9:.1f}"),
        _or_dash(row.stages_s.get("build"), "{:.1f}".format),
    ]


def _perplexity(cost: Cost | None) -> str:
    return "–" if cost is None else f"{number(cost.perplexity)}, {percent(cost)}{'' if cost.passed else ' FAILED'}"


def _together(texts: Iterable[str]) -> str:
    parts = list(texts)
    return " / ".join(parts) if set(parts) != {"–"} else "–"


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "–" if value is None else text(value)
