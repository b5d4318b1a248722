"""The native layer: with one of its causal flags, without a mask, or with the mask as its input.

Legal because ``proved_attention::native`` computes what ``scaled_dot_product_attention`` does with the call's own
tensors: for every mask where it is handed the mask, and from the causal flag alone, or from nothing, where the mask was
proved to say the same for every index, length and input.
"""

from __future__ import annotations

from functools import partial

from torch.fx import Graph, Node

from passes.graph import ops
from passes.graph.blank_rows import every_row_sees_a_key
from passes.graph.lowerings.lowering import Ability, Action, Lowering
from passes.graph.writing import aten, is_one, made_in, put, size_of
from passes.proof.calls import AttentionCall
from passes.proof.mask import Absent, Causal, Full, LowerRight, Mask


def _causal(kind: str, graph: Graph, call: AttentionCall) -> None:
    mask = None if call.mask is None else _full_mask(graph, call)  # stays as the evidence; the converter drops it
    put(graph, call, ops.NATIVE, (mask, kind, call.scale))


def _full(graph: Graph, call: AttentionCall) -> None:
    put(graph, call, ops.NATIVE, (None, "none", call.scale))


def _masked(graph: Graph, call: AttentionCall) -> None:
    mask = None if call.mask is None else _full_mask(graph, call)
    put(graph, call, ops.NATIVE, (mask, "none", call.scale), blanked=mask is not None and not call.sees_keys)


def _full_mask(graph: Graph, call: AttentionCall) -> Node:
    """The mask with four dimensions, the last two at full size: only batch and heads may broadcast in the native
    layer."""
    assert call.mask is not None
    mask = call.mask
    with graph.inserting_before(call.node):
        for _ in range(4 - mask.meta["val"].dim()):
            mask = made_in(graph, aten.unsqueeze.default, mask, 0)
        rows, columns = mask.meta["val"].shape[-2:]
        if not is_one(rows) and not is_one(columns):
            return mask
        sizes = [size_of(graph, tensor, -2) for tensor in (call.query, call.key)]
        return made_in(graph, aten.expand.default, mask, [-1, -1, *sizes])


CAUSAL = Lowering(Action.NATIVE_CAUSAL, partial(_causal, "upper_left"), (Causal,), Ability.NATIVE)
LOWER_RIGHT = Lowering(
    Action.NATIVE_CAUSAL, partial(_causal, "lower_right"), (LowerRight,), Ability.NATIVE, every_row_sees_a_key
)
FULL = Lowering(Action.NATIVE_FULL, _full, (Absent, Full), Ability.NATIVE)
MASKED = Lowering(Action.NATIVE_MASK, _masked, (Mask,), Ability.NATIVE)
