"""Which programs an engine is built from, and what must be said of the masks that they lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.export import ExportedProgram

from passes.graph.driver import Rewritten
from pipeline.config.schema import Config, StrategyConfig
from pipeline.model.load import LoadedModel
from pipeline.trace import cached_forms, call_form
from pipeline.trace.cache_shape import GRANULE, CacheShape, cache_shape
from pipeline.trace.call_form import InputSpec, Traced


@dataclass(frozen=True)
class Program:
    """A program that an engine was built from, after its strategy; ``inputs`` in the order of its arguments."""

    program: ExportedProgram
    inputs: tuple[InputSpec, ...]


def cache_of(config: Config, loaded: LoadedModel) -> CacheShape | None:
    """The KV cache that this run's engines share; None without one."""
    if config.cache.name == "none":
        return None
    generate = config.benchmark.generate
    longest = generate.input_length + generate.output_length if generate else config.shape.max + GRANULE
    return cache_shape(loaded.model, config.cache, config.shape, max(longest, config.shape.max + 1))


def parts(config: Config, loaded: LoadedModel, cache: CacheShape | None) -> dict[str, Callable[[], Traced]]:
    """What is built, by the name of its engine file: one program, or with a cache the prompts' (``engine``) and the
    next token's (``decode``); each with the function that traces it."""
    model, device = loaded.model, loaded.model.device
    if cache is None:
        form = call_form.CallForm(model, config.model.logits)
        return {"engine": lambda: call_form.trace(form, config.model, config.shape, device)}
    prefill, decode = cached_forms.PrefillForm(model, len(cache.layers)), cached_forms.DecodeForm(model)
    return {
        "engine": lambda: cached_forms.trace_prefill(prefill, cache, config.shape, device),
        "decode": lambda: cached_forms.trace_decode(decode, cache, device),
    }


def assumed(report: dict[str, Any]) -> list[str]:
    """The conditions on whose word masks were dropped from the engine of this ``report``."""
    return list(report["attention"]["summary"]["assumed"])


def dropped(rewritten: Rewritten, strategy: StrategyConfig) -> Iterator[str]:
    """What the reader must know of masks that were dropped without a proof for every input."""
    yield from dict.fromkeys(call.disagreement for call in rewritten.calls if call.disagreement)
    forced: dict[str, list[str]] = {}  # calls that share a mask share the warning
    for call in rewritten.calls:
        if call.unproved:
            shown = (call.counterexample or {}).get("text")
            forced.setdefault(f"({call.reason})" + (f"; {shown}" if shown else ""), []).append(call.name)
    for why, names in forced.items():
        calls = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        yield f"{calls}: mask dropped unproved; right only where it happens to be causal {why}"
    if rewritten.assumed:
        checked = "the runtime checks it" if strategy.guard else "nothing checks it (strategy.guard=false)"
        yield f"masks were dropped on your word that {', '.join(rewritten.assumed)} holds for every input; {checked}"
    if unused := [condition for condition in strategy.assume if condition not in rewritten.assumed]:
        yield f"strategy.assume: no mask was dropped on the word of {', '.join(unused)}"
