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

from passes.errors import RunError
from passes.graph.cache_ops import cache_read, cache_update
from pipeline.trace.cache_layers import HandedIn, caches, of_known_sizes, read, results, stored
from pipeline.trace.cache_shape import CacheShape
from pipeline.trace.cached_forms import WITHOUT
from pipeline.trace.call_form import InputSpec, Traced, exported, own_rows


class _Layer(HandedIn):
    """A layer of a cache that is written at ``position`` [batch], and of which attention is given the first ``places``
    [1, S] to read, the last of them just written."""

    is_sliding = False

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor, places: Tensor, length: int) -> None:
        super().__init__(keys, values)
        self.position, self.places, self.length = position, places, length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        channels = stored(value_states)
        self.keys = cache_update(self.keys, key_states, self.position)
        self.values = cache_update(self.values, channels, self.position)
        keys, values = (cache_read(cache, self.places) for cache in (self.keys, self.values))
        return keys, read(values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.places.shape[1], 0

    def get_seq_length(self) -> int:
        return self.places.shape[1] - self.length

    def get_max_length(self) -> int:
        return self.keys.shape[2]


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
        cache = Cache(layers=[_Layer(k, v, position, places, length) for k, v in zip(keys, values, strict=True)])
        output = self.model(input_ids=input_ids, position_ids=own, cache=cache, use_cache=True, logits_to_keep=last)
        return results(own_rows(output.logits), cache)


def trace_chunk(form: ChunkForm, cache: CacheShape, chunk: int, device: torch.device) -> Traced:
    """The program of ``form`` for chunks of ``chunk`` tokens, of which the capacity of ``cache`` is a multiple; raises
    :class:`RunError` of kind ``chunked_cache`` where a layer keeps fewer tokens than that, since a chunk reads them in
    their order."""
    batch, capacity = cache.batch, cache.capacity
    if any(sizes[2] != capacity for layer in cache.layers for sizes in layer):
        raise RunError(
            "chunked_cache", f"cache.chunk={chunk}: a layer of {type(form.model).__name__} keeps fewer tokens than "
            f"cache.capacity={capacity}; leave cache.chunk out"
        )  # fmt: skip
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
    inputs |= caches(cache, device)
    dynamic: dict[str, Any] | None = None
    if chunk < capacity:
        dynamic = of_known_sizes(inputs) | {"places": {1: Dim("seen", min=chunk, max=capacity)}}
    return Traced(exported(form, inputs, dynamic, WITHOUT), specs)
