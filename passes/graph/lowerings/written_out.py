"""A call with its mask: as matmul, add, softmax and matmul, or as it is.

Legal for every mask: it is applied.
"""

from __future__ import annotations

from torch.fx import Graph

from passes.graph import ops
from passes.graph.lowerings.lowering import Ability, Action, Lowering
from passes.graph.writing import put
from passes.proof.calls import AttentionCall
from passes.proof.mask import Mask


def _decomposed(graph: Graph, call: AttentionCall) -> None:
    put(graph, call, ops.DECOMPOSED, (call.mask, call.is_causal, call.scale, call.sees_keys))


def _untouched(graph: Graph, call: AttentionCall) -> None:
    return None


DECOMPOSED = Lowering(Action.DECOMPOSED, _decomposed, (Mask,), Ability.ATEN, own_words=False)
UNTOUCHED = Lowering(Action.UNTOUCHED, _untouched, (Mask,), Ability.ATEN, own_words=False)
