"""Which programs an engine is built from, and what must be said of the masks that they lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch.export import ExportedProgram

from passes.graph.rewrite import rewrite
from passes.graph.rewritten import Rewritten
from passes.proof.conditions import CONDITIONS
from passes.quantised import QuantisedWeight
from pipeline.config.choices import STRATEGIES
from pipeline.config.lengths import longest_sequence
from pipeline.config.schema import CacheConfig, GenerateShape, ModelConfig, ShapeConfig, StrategyConfig
from pipeline.engine.sections import Attention, attention_of
from pipeline.model import few_bits
from pipeline.trace import cached_forms, call_form, chunk_form, rings
from pipeline.trace.cache_shape import CacheShape, cache_shape
from pipeline.trace.call_form import InputSpec, Traced

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Program:
    """A program that an engine is built from, after its strategy; ``inputs`` in the order of its arguments."""

    program: ExportedProgram
    inputs: tuple[InputSpec, ...]
    attention: Attention
    notes: tuple[str, ...]
    """What must be said of the masks that it lost."""


def cache_of(
    model: PreTrainedModel, cache: CacheConfig, shape: ShapeConfig, generate: GenerateShape | None
) -> CacheShape | None:
    """The KV cache that a run's engines share, large enough for what it is to ``generate``; None without one.  Nothing
    is traced: every layer keeps every token, until it is proved that fewer do (:func:`with_rings`)."""
    if cache.name == "none":
        return None
    return cache_shape(model, cache, shape, longest_sequence(shape, generate))


def with_rings(
    model: PreTrainedModel,
    form: ModelConfig,
    shape: ShapeConfig,
    cache: CacheShape | None,
    quantised: Mapping[str, QuantisedWeight] = MappingProxyType({}),
) -> tuple[CacheShape | None, dict[str, Callable[[], Traced]]]:
    """``cache`` as engines are built for it, with rings where they are proved to do (:mod:`pipeline.trace.rings`), and
    the :func:`parts` over it, of which none is traced that was traced for the proof; raises what tracing raises."""
    made = parts(model, form, shape, cache, quantised)
    if cache is None:
        return cache, made
    proved, step = rings.with_rings(model, cache, made["decode"])
    if step is not None:
        return proved, made | {"decode": lambda: step}
    return proved, parts(model, form, shape, proved, quantised)


def parts(
    model: PreTrainedModel,
    form: ModelConfig,
    shape: ShapeConfig,
    cache: CacheShape | None,
    quantised: Mapping[str, QuantisedWeight] = MappingProxyType({}),
) -> dict[str, Callable[[], Traced]]:
    """What is built, by the name of its engine file: one program, or with a cache the prompts' (``engine``) and the
    next token's (``decode``); each with the function that traces it.  The layers that ``quantised`` names have their
    small weights in it."""
    device = model.device

    def traced(trace: Callable[..., Traced], *arguments: Any) -> Traced:
        with few_bits.small(model, quantised):
            return trace(*arguments, device)

    if cache is None:
        whole = call_form.CallForm(model, form.logits)
        return {"engine": partial(traced, call_form.trace, whole, form, shape)}
    prefill, decode = cached_forms.PrefillForm(model, cache), cached_forms.DecodeForm(model, cache)
    prompts: Callable[[], Traced] = partial(traced, cached_forms.trace_prefill, prefill, cache, shape)
    if cache.chunk is not None:
        prompts = partial(traced, chunk_form.trace_chunk, chunk_form.ChunkForm(model, cache), cache, cache.chunk)
    return {"engine": prompts, "decode": partial(traced, cached_forms.trace_decode, decode, cache)}


def rewritten(traced: Traced, asked: StrategyConfig) -> Program:
    """``traced`` after the strategy ``asked``; raises what :func:`passes.graph.rewrite.rewrite` does."""
    how = asked.name, asked.unproven, asked.assume
    done = rewrite(traced.program, *how, without=asked.without, needed=False)
    return Program(done.program, traced.inputs, attention_of(done), tuple(dropped(done, asked)))


def dropped(rewritten: Rewritten, strategy: StrategyConfig) -> Iterator[str]:
    """What the reader must know of masks that were dropped without a proof for every input."""
    if rewritten.written_out:
        yield (
            f"attention is written out by the model itself ({len(rewritten.written_out)} of its layers): every score "
            "is stored, no fused kernel; it is right, and slower than one, the more so the longer the text"
        )
    elif not rewritten.calls:
        yield "its graph has no attention: there is no mask to prove, and no attention layer"
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
    if STRATEGIES[strategy.name]:  # it takes assumptions
        could_go = Counter(call.conditions for call in rewritten.calls if call.could_go)
        for conditions, count in could_go.items():
            where = " and ".join(CONDITIONS[condition] for condition in conditions)
            yield f"{count} masks stay, and could go if {where}, always: strategy.assume=[{','.join(conditions)}]"
    if unused := [condition for condition in strategy.assume if condition not in rewritten.assumed]:
        yield f"strategy.assume: no mask was dropped on the word of {', '.join(unused)}"
