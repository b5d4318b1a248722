"""The project's own ops for a KV cache of fixed capacity: what a program that generates writes into its graph.

``proved_attention::cache_update`` puts new keys or values in their place in the cache; ``proved_attention::cache_read``
gives its first places or its last, for a chunk of a prompt.
``proved_attention::cached`` is the attention of one new token over the cache: which keys it may see hangs on the
token's position alone, so the mask is not in the graph.  A strategy writes it where the mask that Hugging Face makes
was proved to say the same (:class:`passes.proof.mask.Placed`).

A cache may be a *ring*: token n lies at place n % capacity, so that the cache holds the latest tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from passes.proof.op_kinds import VIEW_LIKE


@torch.library.custom_op("proved_attention::cache_update", mutates_args=())
def cache_update(cache: Tensor, new: Tensor, position: Tensor, ring: bool = False) -> Tensor:
    """``cache`` [B, H, capacity, D] with ``new`` [B, H, L, D] in the places ``position[b]`` .. ``position[b] + L - 1``
    of row b, modulo the capacity where it is a ``ring``, and L is 1 there; ``position`` [B] int64."""
    return update_in_aten(cache, new, position, ring)


def update_in_aten(cache: Tensor, new: Tensor, position: Tensor, ring: bool = False) -> Tensor:
    """What :func:`cache_update` computes, in torch's own words."""
    places = position.view(-1, 1) + torch.arange(new.shape[2], device=new.device)
    if ring:
        places = torch.remainder(places, cache.shape[2])
    return cache.scatter(2, places[:, None, :, None].expand_as(new), new)


@cache_update.register_fake
def _(cache: Tensor, new: Tensor, position: Tensor, ring: bool = False) -> Tensor:
    return torch.empty_like(cache)


@torch.library.custom_op("proved_attention::cache_read", mutates_args=())
def cache_read(cache: Tensor, places: Tensor, last: bool = False) -> Tensor:
    """The first S places of ``cache`` [B, H, capacity, D], or its ``last``, as ``places`` [1, S] is long; nothing else
    of it is read.

    A tensor of its own, and no slice: whether a slice lies contiguous hangs on whether S is the capacity, and what
    torch.export traces would hold for every other S alone."""
    return read_in_aten(cache, places, last)


def read_in_aten(cache: Tensor, places: Tensor, last: bool = False) -> Tensor:
    """What :func:`cache_read` computes, in torch's own words."""
    start = cache.shape[2] - places.shape[1] if last else 0
    return torch.slice_copy(cache, 2, start, start + places.shape[1])


@cache_read.register_fake
def _(cache: Tensor, places: Tensor, last: bool = False) -> Tensor:
    return cache.new_empty((*cache.shape[:2], places.shape[1], cache.shape[3]))


@torch.library.custom_op("proved_attention::cached", mutates_args=())
def cached(
    query: Tensor, key: Tensor, value: Tensor, position: Tensor, scale: float, width: int | None = None
) -> Tensor:
    """Attention of query [B, Hq, 1, D] over key [B, Hkv, capacity, D] and value [B, Hkv, capacity, Dv]; ``position``
    [B] int64, Hq % Hkv == 0.

    Row b sees the keys 0 .. ``position[b]``; of a window of ``width`` keys the last ``width`` tokens up to that place,
    where token n is key n % capacity: itself, as long as the cache is not written round.
    """
    return cached_in_aten(query, key, value, position, scale, width)


def cached_in_aten(
    query: Tensor, key: Tensor, value: Tensor, position: Tensor, scale: float, width: int | None = None
) -> Tensor:
    """What :func:`cached` computes, in torch's own words."""
    places, place = torch.arange(key.shape[2], device=key.device), position.view(-1, 1)
    age = place - places
    if width is None:
        seen = age >= 0
    else:
        age = torch.remainder(age, key.shape[2])
        seen = (age <= place) & (age < width)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, seen[:, None, None], scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.contiguous()


@cached.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, position: Tensor, scale: float, width: int | None = None) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


READ = torch.ops.proved_attention.cache_read.default
UPDATE = torch.ops.proved_attention.cache_update.default
CACHED = torch.ops.proved_attention.cached.default


def update_behind(node: Node) -> Node | None:
    """The cache update whose result ``node``, the key or value of an attention call, is a view of, if it is one."""
    while node.target in VIEW_LIKE:
        node = node.args[0]  # type: ignore[assignment]
    return node if node.target is UPDATE else None
