"""Prompts: every strategy and rival at one length, and a few of them at several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.generation_table import build_s, engine_mb
from benchmarks.shown import Shown, ms, table, times_of
from benchmarks.stacks import caption
from benchmarks.ways import Row, Task, Way, at, faster
from pipeline.compare.numbers import number
from pipeline.record.report import worst_case

COLUMNS = (
    "row", "device ms (95 %)", "host ms", "of the roofline", "times as fast as `upstream` (95 %)", "error / allowed",
    "native attention", "engine, MB", "device memory at its peak, GB", "CUDA + weights + cache + activations, GB",
    "build, s", "",
)  # fmt: skip
SWEPT = ("detect_causal", "upstream", "torch_compile")
"""What runs at several lengths, in this order: strategies of engines of one length, and a rival."""
NAMES = {"detect_causal": "`detect_causal`", "upstream": "`upstream`", "torch_compile": "torch.compile"}
LEAST = 3
"""So many lengths are a sweep."""


def prompt_tables(rows: Iterable[Row], environment: Mapping[str, Any]) -> str:
    """A table for each task of a prompt that is not one length of many."""
    alone = groupby(beside_sweeps(rows), lambda row: row.task)
    return "\n".join(_table(task, list(group), environment) for task, group in alone)


def beside_sweeps(rows: Iterable[Row]) -> list[Row]:
    """Those of prompts, without the tasks of which :func:`length_table` shows every row."""
    every = [row for row in rows if row.task.kind == "prefill"]
    swept = {row.task for sweep in sweeps(every).values() for each in sweep.values() for row in each.values()}
    count = Counter(row.task for row in every)
    return [row for row in every if row.task not in swept or count[row.task] > len(SWEPT)]


def _table(task: Task, rows: Sequence[Row], environment: Mapping[str, Any]) -> str:
    shown = Shown(rows, environment)
    precisions = "/".join(dict.fromkeys(row.way.precision for row in rows))
    heading = f"**{task.model}**, {task.weights} weights, {precisions}, a prompt of {task.size}; {caption(environment)}"
    return f"{heading}.{shown.above}\n\n{table(COLUMNS, [_line(row, rows, shown) for row in rows])}{shown.below}"


def _line(row: Row, rows: Sequence[Row], shown: Shown) -> list[str]:
    verify = row.report["verify"] or {}
    error = "–"
    if verify.get("cases"):
        worst = worst_case(verify)
        error = " / ".join("–" if worst[k] is None else number(worst[k], 2) for k in ("relative_error", "tolerance"))
    if row.time is None:
        return [shown.label(row), *["–"] * 4, error, *["–"] * 5, shown.remarks(row)]
    fraction, memory = row.median("prefill", "roofline_fraction"), row.median("memory", "peak_bytes")
    return [
        shown.label(row),
        times_of(row.time),
        ms(row.median("prefill", "host_ms", "median"), 2),
        "–" if fraction is None else f"{fraction:.0%}",
        _against(row, rows),
        error,
        _attention(row.report["engine"]),
        ms(engine_mb(row.report), 0),
        ms(None if memory is None else memory / 1e9, 1),
        _parts(row),
        ms(build_s(row.report), 0),
        shown.remarks(row),
    ]


def _parts(row: Row) -> str:
    """What the memory of an engine of prompts is made of: CUDA's own, its weights, its cache, and what it runs in."""
    memory = [row.median("memory", f"{part}_bytes") for part in ("context", "cache", "activation")]
    context, cache, activations = memory
    weights = at(row.report, "engine", "bytes")
    if context is None or cache is None or activations is None or weights is None:
        return "–"
    return " + ".join(f"{part / 1e9:.1f}" for part in (context, weights, cache, activations))


def _against(row: Row, rows: Sequence[Row]) -> str:
    """How many times as fast as what Torch-TensorRT does by itself for the same lengths."""
    upstream = [r for r in rows if r.time and r.way.strategy == "upstream" and r.way.lengths == row.way.lengths]
    if not upstream:
        return "–"
    return "1" if upstream[0] is row else str(faster(row, upstream[0]))


def _attention(engine: Mapping[str, Any] | None) -> str:
    """The engine's native attention layers, by kind."""
    count, causal, masked = (at(engine or {}, f"iattention{kind}") for kind in ("", "_causal", "_masked"))
    if count is None:
        return "–"
    kinds = {"causal": causal, "masked": masked, "full": count - causal - masked}
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n) or "none"


Sweep = dict[int, dict[str, Row]]
"""Length -> what of :data:`SWEPT` ran there, be it without a time."""


def sweeps(rows: Iterable[Row]) -> dict[Task, Sweep]:
    """By task, its length left out: prompts of several lengths, each by engines (or a compilation) of that length."""
    found: dict[Task, Sweep] = {}
    for row in rows:
        if row.task.kind == "prefill" and row.way.lengths == "one" and not row.way.options:
            name = _name(row.way)
            lengths = found.setdefault(row.task._replace(input_length=0), {})
            lengths.setdefault(row.task.input_length, {}).setdefault(name, row)  # of two the faster
    chosen: dict[Task, Sweep] = {}
    for task, lengths in found.items():
        known = {n: {name: each[name] for name in SWEPT if name in each} for n, each in sorted(lengths.items())}
        known = {n: each for n, each in known.items() if each}
        if len(known) >= LEAST:
            chosen[task] = known
    return chosen


def _name(way: Way) -> str:
    return way.strategy if way.is_ours else way.backend


def length_table(rows: Iterable[Row], environment: Mapping[str, Any]) -> str:
    """What a prompt takes by its length; empty where no task has several."""
    made = []
    for task, lengths in sweeps(rows).items():
        names = [name for name in SWEPT if any(name in each for each in lengths.values())]
        shown = Shown([row for each in lengths.values() for row in each.values()], environment)
        ours, *others = names
        header = ["tokens", f"{NAMES[ours]}, ms (95 %)"]
        header += [text for name in others for text in (f"{NAMES[name]}, ms (95 %)", "times as long as ours")]
        header += [*(f"{NAMES[name]}, GB" for name in names), ""]
        lines = []
        for length, each in lengths.items():
            timed = {name: row for name, row in each.items() if row.time}
            line = [str(length), times_of(each[ours].time if ours in each else None)]
            for name in others:
                line.append(times_of(each[name].time if name in each else None))
                line.append(str(faster(timed[ours], timed[name])) if {ours, name} <= set(timed) else "–")
            memory = [timed[name].median("memory", "peak_bytes") if name in timed else None for name in names]
            line += [ms(None if peak is None else peak / 1e9, 1) for peak in memory]
            said = ((NAMES[name], shown.remarks(row)) for name, row in each.items())
            lines.append([*line, "; ".join(f"{name}: {text}" for name, text in said if text)])
        heading = (
            f"**{task.model}**, {task.weights} weights, fp16, batch {task.batch}, engines of one length, GB of device "
            f"memory at its peak; {caption(environment)}"
        )
        made.append(f"{heading}.{shown.above}\n\n{table(header, lines)}")
    return "\n".join(made)
