"""The table of issue 4129 from report.json files: a model at a time, one row for each way to generate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.shown import Shown, counted, ms, table, times_of
from benchmarks.stacks import caption
from benchmarks.ways import Row, Task, Way, at, faster

REPORT_MS: dict[str, dict[tuple[str, str, str], int]] = {
    # pytorch/TensorRT issue 4129: A100 80GB PCIe, fp16, 2048 tokens in, 128 out, batch 1; ms for the whole generation.
    # Columns PyTorch; sdpa, no cache; iattention; sdpa, static_v1 cache; plugin.  Keys: backend, cache, strategy.
    model: dict(
        zip(
            [
                ("eager", "none", ""),
                ("tensorrt", "none", "upstream"),
                ("tensorrt", "none", "detect_causal"),
                ("tensorrt", "static", "detect_causal"),
                ("plugin", "in_engine", ""),
            ],
            times,
            strict=True,
        )
    )
    for model, times in {
        "qwen2_5_0_5b": (4751, 3271, 5421, 1238, 421),
        "qwen3_0_6b": (6875, 4031, 6792, 1708, 569),
        "llama3_1b": (7053, 5466, 8283, 1379, 465),
    }.items()
}
REPORT_SIZE = (1, 2048, 128)
EAGER = ("eager", "none", "")
COLUMNS = (
    "row", "whole generation, ms (95 %)", "first token, ms", "prompts back to back, ms", "per token, ms",
    "of the roofline", "times as fast as eager without cache", "the report's, A100", "device memory at its peak, GB",
    "engine, MB", "build, s", "",
)  # fmt: skip


def generation_tables(rows: Iterable[Row], environment: Mapping[str, Any]) -> str:
    """The generations of one sequence among ``rows``, a Markdown table for each task, fastest first; rows without a
    time last, with their reason.  ``environment`` is what stands over the tables."""
    alone = [row for row in rows if row.task.kind == "generate" and row.task.batch == 1]
    return "\n".join(_table(task, list(group), environment) for task, group in groupby(alone, lambda row: row.task))


def _table(task: Task, rows: Sequence[Row], environment: Mapping[str, Any]) -> str:
    shown = Shown(rows, environment)
    eager = next((row for row in rows if row.time and _key(row.way) == EAGER), None)
    precisions = "/".join(dict.fromkeys(row.way.precision for row in rows))
    heading = f"**{task.model}**, {task.weights} weights, {precisions}, {task.size}; {caption(environment)}"
    published = REPORT_MS.get(task.model, {}) if task[3:] == REPORT_SIZE else {}
    lines = [_line(row, eager, published, shown) for row in rows]
    return f"{heading}.{shown.above}\n\n{table(COLUMNS, lines)}{shown.below}"


def _line(row: Row, eager: Row | None, published: Mapping[tuple[str, str, str], int], shown: Shown) -> list[str]:
    then = published.get(_key(row.way))
    ratio_then = f"{published[EAGER] / then:.1f}" if then else "–"
    if row.time is None:
        return [shown.label(row), *["–"] * 6, ratio_then, *["–"] * 3, shown.remarks(row)]
    fraction = row.median("generate", "roofline_fraction")
    memory = row.median("memory", "peak_bytes")
    return [
        shown.label(row),
        f"{row.time.median:.1f} ({row.time.low:.1f}–{row.time.high:.1f})",
        ms(row.median("generate", "ttft_ms", "median"), 2),
        ms(row.median("prefill", "device_ms", "median"), 2),
        ms(row.median("generate", "tpot_ms", "median"), 3),
        "–" if fraction is None else f"{fraction:.0%}",
        "–" if eager is None else f"{faster(row, eager).value:.1f}",
        ratio_then,
        ms(None if memory is None else memory / 1e9, 1),
        ms(engine_mb(row.report), 0),
        ms(build_s(row.report), 0),
        shown.remarks(row),
    ]


def engine_mb(report: Mapping[str, Any]) -> float | None:
    """Of all engines of a run together."""
    sizes = [at(report, "engine", "bytes"), at(report, "decode", "engine", "bytes")]
    return sum(size or 0 for size in sizes) / 1e6 if sizes[0] else None


def build_s(report: Mapping[str, Any]) -> float | None:
    """Of an engine out of the store: when it was built."""
    stored: float | None = (at(report, "store", "stages_s") or {}).get("build")
    return stored if stored is not None else (report["stages_s"] or {}).get("build")


def _key(way: Way) -> tuple[str, str, str]:
    return way.backend, way.cache, way.strategy


BATCHES = ("sequences at once", "row", "whole generation, ms (95 %)", "tokens a second", "times as fast (95 %)",
           "per token, ms", "device memory at its peak, GB", "")  # fmt: skip


def batch_table(rows: Iterable[Row], environment: Mapping[str, Any]) -> str:
    """Generations of several sequences at once, of each model that has some: each row beside the slowest of its
    batch; empty where there are none."""
    made = []
    generating = [row for row in rows if row.task.kind == "generate"]
    several = {row.task._replace(batch=0) for row in generating if row.task.batch > 1}
    for common in sorted(several):
        ways = {row.way for row in generating if row.task.batch > 1 and row.task._replace(batch=0) == common}
        chosen = [row for row in generating if row.task._replace(batch=0) == common and row.way in ways]
        shown = Shown(chosen, environment)
        lines = [
            [str(batch), *line] for batch, group in groupby(chosen, lambda row: row.task.batch)
            for line in _of_one_batch(list(group), shown)
        ]  # fmt: skip
        heading = (
            f"**{common.model}**, {common.weights} weights, {common.input_length} tokens in, {common.output_length} "
            f"out, {counted(len({row.task.batch for row in chosen}), 'batch', 'batches')}; {caption(environment)}"
        )
        made.append(f"{heading}.{shown.above}\n\n{table(BATCHES, lines)}")
    return "\n".join(made)


def _of_one_batch(rows: Sequence[Row], shown: Shown) -> list[list[str]]:
    slowest = [row for row in rows if row.time][-1:]
    lines = []
    for row in rows:
        memory, task = row.median("memory", "peak_bytes"), row.task
        rate = None if row.time is None else task.batch * task.output_length / row.time.median * 1e3
        lines.append(
            [
                shown.label(row),
                times_of(row.time),
                ms(rate, 0),
                str(faster(row, slowest[0])) if row.time and slowest != [row] else "–",
                ms(row.median("generate", "tpot_ms", "median"), 3),
                ms(None if memory is None else memory / 1e9, 1),
                shown.remarks(row),
            ]
        )
    return lines
