"""``dry_run=true``: what a sweep would do, and roughly what it would take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from passes.errors import UserError
from passes.precision import FEW_BITS, PRECISIONS
from pipeline.config.lengths import capacity_of, longest_sequence
from pipeline.config.schema import Config, ModelConfig
from pipeline.record.report import read_report
from pipeline.sweep.jobs import Job, at
from pipeline.sweep.keys import Commits, content_key, surroundings
from pipeline.sweep.ledger import Ledger


def show(jobs: Sequence[Job]) -> None:
    """Print the plan; creates nothing."""
    here, output = surroundings(), Path(jobs[0].config.output)
    ledger, earlier, commits = Ledger(output), _earlier(output), Commits()
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("job", "", "time", "device memory"):
        table.add_column(column, overflow="fold")
    models: dict[str, Sizes | None] = {}
    times: list[float | None] = []
    most = 0.0
    for job in jobs:
        if not job.config.rerun and ledger.finished(content_key(job.config, here, commits)):
            table.add_row(Text(job.label), "finished")
            continue
        times.append(_seconds(job.config, earlier))
        memory = device_bytes(job.config, models)
        most = max(most, memory or 0.0)
        table.add_row(Text(job.label), "to do", _time(times[-1]), _memory(memory))
    known = [seconds for seconds in times if seconds is not None]
    console = Console(highlight=False)
    console.print(table)
    for note in dict.fromkeys(note for job in jobs for note in job.config.notes):
        console.print(Text(f"! {note}"))
    console.print(f"\n{len(jobs)} jobs, {len(jobs) - len(times)} of them finished, {len(times)} to do")
    if times:
        strange = len(times) - len(known)
        rest = f", without {strange} jobs unlike any that was done here" if strange else ""
        time = f"time {_time(sum(known))}{rest}" if known else "time unknown: nothing like it was done here yet"
        console.print(f"{time}; device memory up to {_memory(most or None)}")


@dataclass(frozen=True)
class Sizes:
    """What of a model device memory hangs on."""

    parameters: int
    vocabulary: int
    cached: int
    """Numbers that a KV cache keeps of a token."""


def device_bytes(config: Config, known: dict[str, Sizes | None]) -> float | None:
    """Device memory at its peak, while the engine is compared with PyTorch: the weights at ``precision``, the wider
    reference, the engine, the logits of all three, and the KV cache that the engine fills; without workspaces and
    activations.  None: no architecture.

    ``known`` keeps the sizes of the models that were asked for.
    """
    which = json.dumps([config.model.path, config.model.architecture], sort_keys=True)
    if which not in known:
        known[which] = _sizes(config.model)
    if (found := known[which]) is None:
        return None
    precision, few = PRECISIONS[config.number_type], FEW_BITS.get(config.precision)
    positions = config.shape.max if config.model.logits == "all" else 1
    copies = 2 if config.backend.name == "tensorrt" else 1
    each = float(copies * precision.bytes + precision.reference_dtype.itemsize)
    logits = each * config.shape.batch * positions * found.vocabulary
    cached = _caches(config) * config.shape.batch * found.cached * precision.bytes
    if few is not None:  # as PyTorch has them beside the model, a byte each, and as the engine has
        each += 1 + few.bits / 8 - precision.bytes
    return each * found.parameters + logits + cached


def _caches(config: Config) -> int:
    """Tokens of a sequence that the engine's KV cache has room for, twice where it comes out as new tensors."""
    if config.cache.name == "none" or config.backend.name != "tensorrt":
        return 0
    capacity = capacity_of(config.cache, longest_sequence(config.shape, config.benchmark.generate))
    return capacity * (2 if config.cache.name == "static" else 1)


def _sizes(model: ModelConfig) -> Sizes | None:
    """From the architecture alone: the model without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.model import checkpoint
    from pipeline.model.gguf import quiet

    try:
        with quiet(), torch.device("meta"):
            described = checkpoint.architecture(model)
            empty = AutoModelForCausalLM.from_config(described)
    except UserError:
        return None
    text = described.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    return Sizes(parameters, text.vocab_size, 2 * text.num_hidden_layers * heads * size)


def _kind(config: dict[str, Any]) -> str:
    """Jobs of one kind take about as long."""
    parts = ("model.name", "model.path", "backend.name", "shape", "cache.name", "benchmark.name", "until")
    return json.dumps([at(config, part) for part in parts], sort_keys=True)


def _earlier(output: Path) -> dict[str, list[float]]:
    """Kind of run -> seconds that those under ``output`` took which did not fail."""
    found: dict[str, list[float]] = {}
    for path in output.glob("*/*/report.json"):
        report = read_report(path)
        if report is not None and report["status"] != "failed":
            found.setdefault(_kind(report["config"]), []).append(sum(report["stages_s"].values()))
    return found


def _seconds(config: Config, earlier: dict[str, list[float]]) -> float | None:
    seconds = earlier.get(_kind(config.to_dict()))
    return median(seconds) if seconds else None


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _memory(size: float | None) -> str:
    if size is None:
        return "unknown"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
