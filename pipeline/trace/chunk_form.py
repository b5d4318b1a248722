"""The program that runs a prompt in chunks over its KV cache, as a call form that can be traced.

A chunk of ``cache.chunk`` tokens is written into the cache, and its queries see the places of the cache up to
themselves: the first S of them, of which the chunk's own are the last.  So one program serves every chunk of every
prompt that the cache holds, in memory that does not grow with the prompt; its mask hangs on sizes alone, and is proved
lower-right causal at every S.  The last chunk of a prompt is filled up behind its tokens, where causality hides it:
there is no other length than the chunk's, and so nothing that is compiled for a prompt's.  States have no place for
what is hidden: of a model that keeps any, a chunk is full, and the tokens behind the last one are run as steps are.

Of a layer with a ring the queries see what the ring holds, in the order of the tokens, and the chunk's own behind it:
the last M tokens up to the chunk's end, or all there are.  Again the mask hangs on sizes alone.  The ring then takes
the latest of a row's own tokens; what fills the last chunk up, and what follows a row that has ended, leaves no trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from passes.errors import RunError
from passes.graph.cache_ops import cache_read, cache_update
from pipeline.trace.cache_layers import HandedIn, caches, in_order, latest, of_known_sizes, read, results, stored, taken
from pipeline.trace.cache_shape import CacheShape
from pipeline.trace.cached_forms import WITHOUT
from pipeline.trace.call_form import InputSpec, Traced, exported, own_rows


class _Kept(Protocol):
    """What layers of one kind keep of a chunk, and what it sees of them."""

    @property
    def seen(self) -> Tensor:
        """[1, S], one for each token that is seen, the last of them the chunk's own."""

    def written(self, cache: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """``cache`` [batch, heads, places, size] behind the chunk, whose tokens are ``new`` [batch, heads, chunk,
        size]; and those that it sees, [batch, heads, S, size]."""


@dataclass(frozen=True)
class _Whole:
    """Every token, at the place of its number: the chunk's from ``position`` [batch] on."""

    seen: Tensor
    position: Tensor

    def written(self, cache: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        cache = cache_update(cache, new, self.position)
        return cache, cache_read(cache, self.seen)


@dataclass(frozen=True)
class _Ring:
    """The latest tokens: ``order`` [places] has them by age, the oldest first; of these and the chunk's behind them
    ``left`` [batch, places] are in the ring when the chunk has run."""

    seen: Tensor
    order: Tensor
    left: Tensor

    @staticmethod
    def of(places: int, near: Tensor, position: Tensor, real: Tensor) -> _Ring:
        """Of a chunk that begins at ``position`` [batch], the same for all rows; ``near``: see :attr:`_Kept.seen`;
        ``real``: see :meth:`ChunkForm.forward`."""
        order = torch.remainder(position[:1] + torch.arange(places, device=near.device), places)
        oldest = position.unsqueeze(1) - places
        return _Ring(near, order, latest(position + real - 1, places) - oldest)

    def written(self, cache: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        # An engine updates the ring where it lies: what is written hangs on ``tokens``, so the ring is read before.
        tokens = torch.cat([cache.index_select(2, self.order), new], 2)
        start = torch.zeros_like(self.left[:, 0])
        return cache_update(cache, taken(tokens, self.left), start), cache_read(tokens, self.seen, True)


class _Layer(HandedIn):
    """A layer of a cache behind a chunk of ``length`` tokens, the last of ``places`` [1, S]."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, kept: _Kept, places: Tensor, length: int) -> None:
        super().__init__(keys, values)
        self.kept, self.places, self.length = kept, places, length
        self.is_sliding = isinstance(kept, _Ring)  # transformers asks the first such layer how many keys its mask is of

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, keys = self.kept.written(self.keys, key_states)
        self.values, values = self.kept.written(self.values, stored(value_states))
        return keys, read(values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        count = self.kept.seen.shape[1]
        return count, self.places.shape[1] - count if self.is_sliding else 0

    def get_seq_length(self) -> int:
        return self.places.shape[1] - self.length

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class ChunkForm(nn.Module):
    """A chunk of each prompt in, the logits behind one token of each and the caches with the chunk in them out."""

    def __init__(self, model: PreTrainedModel, cache: CacheShape) -> None:
        super().__init__()
        self.model = model
        self.cache = cache

    def forward(
        self,
        input_ids: Tensor,
        last: Tensor,
        places: Tensor,
        keys: list[Tensor] | None = None,
        values: list[Tensor] | None = None,
        states: list[Tensor] | None = None,
        real: Tensor | None = None,
        near: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """``input_ids`` [batch, chunk]; ``last`` [batch], the place in the chunk of the token behind which each row's
        logits are asked for; ``places`` [1, S], 0 .. S - 1: the tokens' positions, the last ``chunk`` of them this
        chunk's; the caches and every state.  Where there are rings, ``real`` [batch], how many of the chunk's tokens
        are the row's own, and ``near`` [1, M], the last of ``places``: those of the tokens before it that a ring holds,
        and of its own.

        Returns logits [batch, 1, vocabulary], the caches and the states.
        """
        batch, length = input_ids.shape
        own = places[:, -length:]
        position = own[:, 0].expand(batch)
        kept: dict[int | None, _Kept] = {None: _Whole(places, position)}
        if real is not None and near is not None:
            (ring,) = {each for each in self.cache.rings if each is not None}
            kept[ring] = _Ring.of(ring, near, position, real)
        layers = zip(keys or [], values or [], self.cache.rings, strict=True)
        cache = in_order(self.cache, [_Layer(k, v, kept[each], places, length) for k, v, each in layers], states or [])
        output = self.model(input_ids=input_ids, position_ids=own, cache=cache, use_cache=True, logits_to_keep=last)
        return results(own_rows(output.logits), self.cache, cache)


def trace_chunk(form: ChunkForm, cache: CacheShape, chunk: int, device: torch.device) -> Traced:
    """The program of ``form`` for chunks of ``chunk`` tokens, of which the capacity of ``cache`` is a multiple."""
    batch, capacity = cache.batch, cache.capacity
    specs = [
        InputSpec("input_ids", batch, chunk, chunk, chunk),
        InputSpec.places(batch),
        InputSpec("places", 1, chunk, capacity, capacity),
        *cache.specs(),
    ]
    seen = chunk if chunk == capacity else chunk + 17  # no bound of the range, so that it is not specialised
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(batch, chunk, dtype=torch.int64, device=device),
        "last": torch.zeros(batch, dtype=torch.int64, device=device),
        "places": torch.arange(seen, device=device).unsqueeze(0),
    }
    inputs |= caches(cache, device)
    if (most := cache.near) is not None:
        specs.append(InputSpec("real", batch, 1, 1, 1, sizes=(batch,)))
        specs.append(InputSpec("near", 1, chunk, most, most))
        inputs["real"] = torch.ones(batch, dtype=torch.int64, device=device)
        inputs["near"] = inputs["places"][:, : min(chunk + 11, seen)].clone()
    dims = {spec.name: {1: Dim(f"seen_{spec.name}", min=spec.min, max=spec.max)} for spec in specs if spec.dynamic}
    program = exported(form, inputs, of_known_sizes(inputs) | dims if dims else None, WITHOUT)
    if any(not node.users for node in program.graph.find_nodes(op="placeholder") if node.name.startswith("states_")):
        raise RunError(
            "export",
            f"{type(form.model).__name__} takes several tokens at once for the begin of a text, whatever its states "
            f"are, so that its prompts cannot be cut; {WITHOUT}",
        )
    return Traced(program, tuple(specs))
