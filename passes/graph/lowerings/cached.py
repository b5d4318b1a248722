"""Attention of one token over a KV cache of fixed capacity, in which its position says what it sees.

Legal because ``proved_attention::cached`` lets row b see the keys 0 .. ``position[b]``, or the last tokens up to that
place, and the mask was proved to be just that, with q = 0 and the very position at which row b of the cache is written.
"""

from __future__ import annotations

from torch.fx import Graph

from passes.graph import cache_ops
from passes.graph.lowerings.lowering import Ability, Action, Lowering
from passes.graph.writing import is_one, put
from passes.proof.calls import AttentionCall
from passes.proof.mask import Offset, OffsetWindow, Placed, Ring
from passes.proof.masks import Proof, Status


def over_cache(call: AttentionCall) -> bool:
    """Whether the call is one over a KV cache of fixed capacity, or of one query over keys that are made of what such a
    cache holds (DeepSeek keeps latents)."""
    return cache_ops.update_behind(call.key) is not None or is_one(call.query.meta["val"].shape[2])


def _is_where_it_is_written(call: AttentionCall, proof: Proof) -> bool:
    update = cache_ops.update_behind(call.key)
    if update is None or proof.status is not Status.PROVED or not is_one(call.query.meta["val"].shape[2]):
        return False
    row = "b" if update.args[0].meta["val"].shape[0] > 1 else 0  # type: ignore[union-attr]
    mask = proof.mask
    return isinstance(mask, Placed) and (mask.source, mask.element) == (str(update.args[2]), (row,))


def _cached(graph: Graph, call: AttentionCall) -> None:
    update = cache_ops.update_behind(call.key)
    assert update is not None
    width = [call.proved.width] if isinstance(call.proved, OffsetWindow | Ring) else []
    put(graph, call, cache_ops.CACHED, (update.args[2], call.scale, *width))


CACHED = Lowering(Action.CACHED, _cached, (Offset, OffsetWindow, Ring), Ability.CACHE, _is_where_it_is_written)
