"""What a KV cache of fixed capacity is made of, told from the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from passes.errors import UserError, whole_message
from pipeline.config.lengths import GRANULE, capacity_of
from pipeline.config.schema import CacheConfig, ShapeConfig
from pipeline.model.positions import positions_of
from pipeline.model.rotary import check_crossing, turn_of
from pipeline.trace.cache_states import State, states_of
from pipeline.trace.call_form import InputSpec
from pipeline.trace.largest import MOST

APART = 0.05
"""Relative difference of logits that is no rounding, but other positions."""

KNOWN = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    DummyLayer,
)
"""What transformers keeps of a layer, where all of it is keys and values of every token, states of one size, or nothing
(a layer of experts alone)."""


@dataclass(frozen=True)
class CacheShape:
    """``layers``: of each layer that attends the shapes of its keys [batch, heads, capacity, head size] and its values
    [batch, heads * head size, capacity, 1].

    A channel's values lie side by side, since a token's attention sums over them (:mod:`passes.tensorrt.cache`);
    to whatever updates the cache they look like heads of size 1.  A layer with fewer places than the capacity is a
    ring: token n lies at place n modulo its places, and it holds the latest tokens (:mod:`pipeline.trace.rings`).
    """

    mode: str
    batch: int
    capacity: int
    longest: int
    """Tokens of a sequence at most: the capacity, or what the model has positions for."""
    layers: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    dtype: torch.dtype
    chunk: int | None = None
    """Tokens of a prompt that run at once over the cache, whose capacity is a multiple of it; None: all of them.  A
    recurrence is always cut into pieces: how many there are is a number that no program of several lengths can have."""
    turn: int | None = None
    """Tokens that no sequence may cross once it is begun (:func:`pipeline.model.rotary.turn_of`)."""
    attends: tuple[bool, ...] = ()
    """Of each layer of the model whether it is one of ``layers``; empty: they all are."""
    states: tuple[State, ...] = ()
    """What layers keep beside keys and values, or instead."""

    @staticmethod
    def of(described: dict[str, Any]) -> CacheShape:
        """From an engine's manifest."""
        read = {
            "layers": tuple((tuple(keys), tuple(values)) for keys, values in described["layers"]),
            "attends": tuple(described.get("attends", ())),
            "states": tuple(State.of(each) for each in described.get("states", ())),
            "dtype": getattr(torch, described["dtype"]),
        }
        return CacheShape(**described | read)

    @property
    def steps(self) -> int:
        """How many programs of a step take turns: two where something comes out of one as a new tensor."""
        return 2 if self.mode == "static" or self.states else 1

    @property
    def padded(self) -> bool:
        """Whether padding behind a row's tokens changes nothing of it.  Of a single row no program is told the end."""
        return self.turn is None and (not self.states or self.batch > 1)

    @property
    def rings(self) -> tuple[int | None, ...]:
        """Of each layer the places of its ring, the same for all that have one; None where it keeps every token."""
        places = [keys[2] for keys, _ in self.layers]
        return tuple(count if count < self.capacity else None for count in places)

    @property
    def near(self) -> int | None:
        """How many tokens at most a chunk of a prompt is given of layers with a ring: those before it that are there,
        and its own.  None where there are no rings, or no chunks."""
        places = next((ring for ring in self.rings if ring is not None), None)
        return None if places is None or self.chunk is None else min(places + self.chunk, self.capacity)

    def with_rings(self, places: int, where: Sequence[bool]) -> CacheShape:
        """This cache with rings of so many ``places`` in the layers ``where`` that is true."""
        layers = tuple(
            tuple((*shape[:2], places, shape[3]) if ring else shape for shape in layer)
            for ring, layer in zip(where, self.layers, strict=True)
        )
        return replace(self, layers=layers)  # type: ignore[arg-type]

    def filled(self, caches: Sequence[Tensor], length: int) -> list[Tensor]:
        """What a prompt of ``length`` tokens fills of ``caches``, which are in the order of :meth:`specs`: all of a
        ring and of a state."""
        rows = [length if places is None else places for places in self.rings] * 2
        count = len(rows)
        return [cache[:, :, : rows[i]] if i < count else cache for i, cache in enumerate(caches)]

    def specs(self) -> tuple[InputSpec, ...]:
        """Of every key cache, every value cache and every state: the inputs of a program."""
        dtype = str(self.dtype).removeprefix("torch.")
        found = []
        for which, kind in enumerate(("keys", "values")):
            for i, layer in enumerate(self.layers):
                size = layer[0][2]
                found.append(InputSpec(f"{kind}_{i}", self.batch, size, size, size, sizes=layer[which], dtype=dtype))
        for i, state in enumerate(self.states):
            found.append(InputSpec(f"states_{i}", self.batch, 1, 1, 1, sizes=state.sizes, dtype=state.dtype))
        return tuple(found)

    def named(self, caches: Sequence[Tensor]) -> dict[str, Tensor]:
        """``caches`` in the order of :meth:`specs`, by the names of the inputs."""
        return dict(zip([spec.name for spec in self.specs()], caches, strict=True))

    def states_in(self, caches: Sequence[Tensor]) -> Sequence[Tensor]:
        """The states among ``caches``, which are in the order of :meth:`specs`."""
        return caches[2 * len(self.layers) :]

    def check(self, prompts: Sequence[int], new_tokens: int) -> None:
        """Raises :class:`UserError` for ``prompts`` [batch, length] and ``new_tokens`` more that it cannot hold."""
        batch, length = prompts
        if batch != self.batch:
            raise UserError(f"a batch of {batch} prompts: the engine was built for shape.batch={self.batch}")
        check_crossing(self.turn, length, length + new_tokens, f"{new_tokens} new tokens")
        if length + new_tokens > self.longest:
            limit = f"cache.capacity={self.capacity}; set it higher"
            if self.longest < self.capacity:
                limit = f"max_position_embeddings={self.longest} of the model"
            if self.longest == self.turn:
                limit = f"{self.turn}, where the model turns all positions anew, and this cache does not"
            raise UserError(f"{length} tokens and {new_tokens} more: above {limit}")

    def tensors(self, device: torch.device) -> list[Tensor]:
        """Empty caches in the order of :meth:`specs`.  Zeros: what is not seen must still be a number."""
        return [torch.zeros(spec.shape(0), dtype=getattr(torch, spec.dtype), device=device) for spec in self.specs()]

    def turns(self, device: torch.device) -> list[list[Tensor]]:
        """Empty caches as the :attr:`steps` have them in turn: what is updated where it lies is the same in all."""
        first = self.tensors(device)
        own = 0 if self.mode == "static" else len(first) - len(self.states)
        return [first, *([*first[:own], *map(torch.zeros_like, first[own:])] for _ in range(1, self.steps))]


def cache_shape(model: PreTrainedModel, cache: CacheConfig, shape: ShapeConfig, longest: int) -> CacheShape:
    """The cache of ``model`` for generations of ``longest`` tokens in all.

    Raises :class:`UserError` for a model with a layer that keeps anything else than keys and values of every token, and
    states of one size; and for what a recurrence cannot do.
    """
    capacity = capacity_of(cache, longest)
    layers, attends, states = [], [], []
    for number, layer in enumerate(_filled(model, cache.name).layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if type(layer) not in KNOWN or (type(layer) in KNOWN[:2] and (keys is None or values is None)):
            raise UserError(
                f"cache={cache.name}: {type(layer).__name__} of this model keeps other things than every token's keys; "
                "set cache=none"
            )
        states += states_of(number, layer, shape.batch)
        attends.append(keys is not None and values is not None)
        if keys is not None and values is not None:
            heads, channels = keys.shape[1], values.shape[1] * values.shape[3]
            layers.append(((shape.batch, heads, capacity, keys.shape[3]), (shape.batch, channels, capacity, 1)))
    recurs = any(state.recurs for state in states)
    if states:
        _check_states(model, cache, shape, recurs)
    _check_positions(model, cache.name)
    most = max((prod(sizes) for layer in layers for sizes in layer), default=0)
    if most > MOST:
        raise UserError(
            f"shape.batch={shape.batch} cache.capacity={capacity}: {most} numbers in the keys of a layer, above the "
            f"{MOST} up to which engines were seen right; set fewer rows, or a smaller capacity"
        )
    positions = positions_of(model.config) or capacity
    longest, turn = min(capacity, positions), turn_of(model.config)
    if turn is not None and (shape.max <= turn or cache.chunk):  # no prompt begins, or is begun again, beyond it
        longest = min(longest, turn)
    sizes = cache.name, shape.batch, capacity, longest, tuple(layers), model.dtype
    where = () if all(attends) else tuple(attends)
    chunk = cache.chunk or (GRANULE if recurs else None)
    return CacheShape(*sizes, chunk=chunk, turn=turn, attends=where, states=tuple(states))


def _check_states(model: PreTrainedModel, cache: CacheConfig, shape: ShapeConfig, recurs: bool) -> None:
    """Raises :class:`UserError` for padding that would run through the states: of rows of a batch, where they recur or
    prompts run in chunks."""
    name = type(model).__name__
    if shape.batch > 1 and (recurs or cache.chunk):
        remedy = "set shape.batch=1, or cache=none" if recurs else "leave out cache.chunk, or set shape.batch=1"
        raise UserError(
            f"shape.batch={shape.batch}: the states of layers of {name} would take in the padding of shorter rows; "
            f"{remedy}"
        )
    if recurs and cache.name != "in_engine":
        raise UserError(
            f"cache={cache.name}: {name} has recurrent layers, and their prompts run in chunks; set cache=in_engine"
        )


def _check_positions(model: PreTrainedModel, mode: str) -> None:
    """Raises :class:`UserError` for a model that counts positions otherwise than from 0 (RoBERTa), as a cache does."""
    tokens = torch.arange(1, 4, device=next(model.parameters()).device).unsqueeze(0)
    places = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    with torch.no_grad():
        own = model(input_ids=tokens, use_cache=False).logits.float()
        told = model(input_ids=tokens, use_cache=False, position_ids=places).logits.float()
    if (own - told).norm() > own.norm() * APART:
        raise UserError(
            f"cache={mode}: {type(model).__name__} numbers positions in a way of its own, and a cache's begin at 0; "
            "set cache=none"
        )


def _filled(model: PreTrainedModel, mode: str) -> DynamicCache:
    """Hugging Face's own cache after two tokens; raises :class:`UserError` where the model does not fill it."""
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        seen = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=tokens, cache=seen, use_cache=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model that takes none raises whatever it comes upon first
        _check_runs(model, tokens)
        said = whole_message(error)
        raise UserError(
            f"cache={mode}: {type(model).__name__} does not take a KV cache ({said}); set cache=none"
        ) from error
    if all(type(layer) in KNOWN[:2] and layer.keys is None for layer in seen.layers):
        raise UserError(f"cache={mode}: {type(model).__name__} keeps no keys and values; set cache=none")
    return seen


def _check_runs(model: PreTrainedModel, tokens: Tensor) -> None:
    """Raises :class:`UserError` where ``model`` does not run on ``tokens`` without a cache either."""
    try:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it comes upon first
        raise UserError(
            f"{type(model).__name__} does not run on tokens alone ({whole_message(error)}); set another precision, or "
            "name another model"
        ) from error
