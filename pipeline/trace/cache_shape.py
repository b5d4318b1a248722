"""What a KV cache of fixed capacity is made of, told from the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from passes.errors import UserError, whole_message
from pipeline.config.schema import CacheConfig, ShapeConfig
from pipeline.model.rotary import turn_of
from pipeline.trace.call_form import InputSpec

GRANULE = 128
"""Capacities are multiples of it, so that a channel's values, side by side, begin at addresses that suit wide loads."""


@dataclass(frozen=True)
class CacheShape:
    """``layers``: of each layer the shapes of its keys [batch, heads, capacity, head size] and its values
    [batch, heads * head size, capacity, 1].

    A channel's values lie side by side, since a token's attention sums over them (:mod:`passes.tensorrt.cache`);
    to whatever updates the cache they look like heads of size 1.
    """

    mode: str
    batch: int
    capacity: int
    longest: int
    """Tokens of a sequence at most: the capacity, or what the model has positions for."""
    layers: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    dtype: torch.dtype
    turn: int | None = None
    """Tokens that no sequence may cross once it is begun (:func:`pipeline.model.rotary.turn_of`)."""

    @staticmethod
    def of(described: dict[str, Any]) -> CacheShape:
        """From an engine's manifest."""
        layers = tuple((tuple(keys), tuple(values)) for keys, values in described["layers"])
        return CacheShape(**{**described, "layers": layers, "dtype": getattr(torch, described["dtype"])})

    def specs(self) -> tuple[InputSpec, ...]:
        """Of every key cache, then every value cache: the inputs of a program."""
        size, dtype = self.capacity, str(self.dtype).removeprefix("torch.")
        return tuple(
            InputSpec(f"{kind}_{i}", self.batch, size, size, size, sizes=layer[which], dtype=dtype)
            for which, kind in enumerate(("keys", "values"))
            for i, layer in enumerate(self.layers)
        )

    def tensors(self, device: torch.device) -> list[Tensor]:
        """Empty caches in the order of :meth:`specs`.  Zeros: what is not seen must still be a number."""
        return [torch.zeros(spec.shape(0), dtype=self.dtype, device=device) for spec in self.specs()]


def cache_shape(model: PreTrainedModel, cache: CacheConfig, shape: ShapeConfig, longest: int) -> CacheShape:
    """The cache of ``model`` for generations of ``longest`` tokens in all.

    Raises :class:`UserError` for a model whose layers do not all keep keys and values of every token.
    """
    capacity = cache.capacity or longest
    capacity = -(-capacity // GRANULE) * GRANULE
    layers = []
    for layer in _filled(model, cache.name).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None or layer.values is None:
            raise UserError(
                f"cache={cache.name}: {type(layer).__name__} of this model keeps other things than every token's keys; "
                "set cache=none"
            )
        keys, values = layer.keys, layer.values
        heads, channels = keys.shape[1], values.shape[1] * values.shape[3]
        layers.append(((shape.batch, heads, capacity, keys.shape[3]), (shape.batch, channels, capacity, 1)))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or capacity
    longest, turn = min(capacity, positions), turn_of(model.config)
    if turn is not None and shape.max <= turn:  # no prompt begins beyond it
        longest = min(longest, turn)
    return CacheShape(cache.name, shape.batch, capacity, longest, tuple(layers), model.dtype, turn=turn)


def _filled(model: PreTrainedModel, mode: str) -> DynamicCache:
    """Hugging Face's own cache after two tokens; raises :class:`UserError` where the model does not fill it."""
    seen = DynamicCache(config=model.config)
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            model(input_ids=tokens, cache=seen, use_cache=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model that takes none raises whatever it comes upon first
        said = whole_message(error)
        raise UserError(
            f"cache={mode}: {type(model).__name__} does not take a KV cache ({said}); set cache=none"
        ) from error
    if not seen.layers:
        raise UserError(f"cache={mode}: {type(model).__name__} keeps no keys and values; set cache=none")
    return seen
