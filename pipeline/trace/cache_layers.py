"""What the programs over a KV cache that is handed in have in common: its layers, and how it goes in and comes out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DummyLayer

from pipeline.trace.cache_shape import CacheShape
from pipeline.trace.cache_states import States, by_layer, made


class HandedIn(CacheLayerMixin):
    """A layer whose ``keys`` and ``values`` are tensors as :class:`CacheShape` has them, and no growing ones."""

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, *_: Any) -> None:
        raise AssertionError("a cache that is handed in is there from the start")


def stored(values: Tensor) -> Tensor:
    """``values`` [batch, heads, length, size] as the cache has them: [batch, heads * size, length, 1]."""
    batch, heads, length, size = values.shape
    return values.transpose(2, 3).reshape(batch, heads * size, length, 1)


def read(values: Tensor, like: Tensor) -> Tensor:
    """Back from :func:`stored`, with the heads and channels of ``like``."""
    batch, heads, _, size = like.shape
    return values.view(batch, heads, size, -1).transpose(2, 3)


def latest(last: Tensor, places: int) -> Tensor:
    """[batch, places], what a ring holds: at place i of row b the latest token up to ``last[b]`` whose number is i
    modulo ``places``, below 0 where there is none."""
    place = last.unsqueeze(1)
    return place - torch.remainder(place - torch.arange(places, device=last.device), places)


def taken(x: Tensor, tokens: Tensor) -> Tensor:
    """[batch, heads, places, size] of ``x`` [batch, heads, length, size]: of row b those at ``tokens[b]`` [places]."""
    if len(x) == 1:
        return x.index_select(2, tokens[0])
    return x.gather(2, tokens[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def in_order(
    shape: CacheShape,
    attending: Iterable[HandedIn],
    states: Sequence[Tensor] | None = None,
    ends: Tensor | None = None,
) -> Cache:
    """transformers' cache of a model's layers, as ``shape`` has them: those of ``attending``, in their order, and those
    that have ``states``, which are in theirs; where there are none yet, a text begins, and its rows end at ``ends``."""
    layers, kept = list(attending), by_layer(shape.states, states, ends)
    numbers = [i for i, attends in enumerate(shape.attends or [True] * len(layers)) if attends]
    placed = dict(zip(numbers, layers, strict=True))
    return Cache(layers=[_joined(placed.get(i), kept.get(i)) for i in range(len(shape.attends) or len(layers))])


def _joined(layer: HandedIn | None, states: States | None) -> Any:
    """What keeps what both keep."""
    if layer is None or states is None:
        return layer or states or DummyLayer()
    both: Any = type(type(layer).__name__, (type(layer), States), {})
    joined = both.__new__(both)
    vars(joined).update(vars(states) | vars(layer))
    return joined


def results(logits: Tensor, shape: CacheShape, cache: Cache) -> tuple[Tensor, ...]:
    """``logits``, every layer's keys, every layer's values, every state of ``shape``."""
    attending: list[Any] = [layer for layer in cache.layers if isinstance(layer, HandedIn)]
    keys, values = [layer.keys for layer in attending], [layer.values for layer in attending]
    return (logits, *keys, *values, *made(shape.states, cache))


def caches(cache: CacheShape, device: torch.device) -> dict[str, Any]:
    """Empty ones, by the names of a program's arguments."""
    return by_name(cache, cache.tensors(device))


def by_name(cache: CacheShape, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """``tensors`` in the order of :meth:`CacheShape.specs`, by the names of a program's arguments."""
    count, rest = len(cache.layers), cache.states_in(tensors)
    lists = {"keys": tensors[:count], "values": tensors[count : 2 * count], "states": rest}
    return {name: list(each) for name, each in lists.items() if each}


def of_known_sizes(inputs: dict[str, Any]) -> dict[str, Any]:
    """torch.export's word for that, of every one of ``inputs``."""
    return {name: [None] * len(value) if isinstance(value, list) else None for name, value in inputs.items()}
