"""The program that runs a prompt in chunks over its KV cache, as a call form that can be traced.

A chunk of ``cache.chunk`` tokens is written into the cache, and its queries see the places of the cache up to
themselves: the first S of them, of which the chunk's own are the last.  So one program serves every chunk of every
prompt that the cache holds, in memory that does not grow with the prompt; its mask hangs on sizes alone, and is proved
lower-right causal at every S.  The last chunk of a prompt is filled up behind its tokens, where causality hides it:
there is no other length than the chunk's, and so nothing that is compiled for a prompt's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import Cache, PreTrainedModel

from passes.graph.cache_ops import cache_read
from pipeline.trace import cached_forms
from pipeline.trace.cache_shape import CacheShape
from pipeline.trace.call_form import InputSpec, Traced, exported, own_rows


class _Layer(cached_forms._Layer):
    """A layer of a cache of which attention is given the first ``places`` [1, S] to read, the last of them just
    written."""

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor, length: int, places: Tensor) -> None:
        super().__init__(keys, values, position, whole=True)
        self.length, self.places = length, places

    def update(self, key_states: Tensor, value_states: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states, *more, **named)
        batch, heads, _, size = value_states.shape
        keys, values = (cache_read(cache, self.places) for cache in (self.keys, self.values))
        return keys, values.view(batch, heads, size, -1).transpose(2, 3)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.places.shape[1], 0

    def get_seq_length(self) -> Any:
        return self.places.shape[1] - self.length


class ChunkForm(nn.Module):
    """A chunk of each prompt in, the logits behind one token of each and the caches with the chunk in them out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, last: Tensor, places: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """``input_ids`` [batch, chunk]; ``last`` [batch], the place in the chunk of the token behind which each row's
        logits are asked for; ``places`` [1, S], 0 .. S - 1: the tokens' positions, the last ``chunk`` of them this
        chunk's; the caches.

        Returns logits [batch, 1, vocabulary] and the caches.
        """
        batch, length = input_ids.shape
        own = places[:, -length:]
        position = own[:, 0].expand(batch)
        cache = Cache(layers=[_Layer(k, v, position, length, places) for k, v in zip(keys, values, strict=True)])
        output = self.model(input_ids=input_ids, position_ids=own, cache=cache, use_cache=True, logits_to_keep=last)
        return cached_forms._results(own_rows(output.logits), cache)


def trace_chunk(form: ChunkForm, cache: CacheShape, chunk: int, device: torch.device) -> Traced:
    """The program of ``form`` for chunks of ``chunk`` tokens, of which the capacity of ``cache`` is a multiple."""
    batch, capacity = cache.batch, cache.capacity
    specs = (
        InputSpec("input_ids", batch, chunk, chunk, chunk),
        InputSpec.places(batch),
        InputSpec("places", 1, chunk, capacity, capacity),
        *cache.specs(),
    )
    seen = capacity if chunk == capacity else chunk + 11  # no bound of the range, so that it is not specialised
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(batch, chunk, dtype=torch.int64, device=device),
        "last": torch.zeros(batch, dtype=torch.int64, device=device),
        "places": torch.arange(seen, device=device).unsqueeze(0),
    }
    inputs |= cached_forms._caches(cache, device)
    dynamic: dict[str, Any] | None = None
    if chunk < capacity:
        dynamic = {name: [None] * len(value) if isinstance(value, list) else None for name, value in inputs.items()}
        dynamic["places"] = {1: Dim("seen", min=chunk, max=capacity)}
    return Traced(exported(form, inputs, dynamic, cached_forms.WITHOUT), specs)
