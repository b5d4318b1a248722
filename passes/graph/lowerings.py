"""How an attention call is written anew: one function for each :class:`passes.graph.strategies.Action`.

Why each is legal: the ops that are written compute what ``scaled_dot_product_attention`` does with the call's own
tensors (:mod:`passes.graph.ops`), once those are brought into the one form that all of them take (:func:`_aligned`);
whether its mask may go was decided before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from passes.errors import RunError
from passes.graph import cache_ops, ops
from passes.graph.strategies import Action
from passes.proof.calls import AttentionCall

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
LAYOUTS = (aten.reshape.default, aten.transpose.int, aten.permute.default, aten.squeeze.dim, ops.BLANKED)
"""Whose result is laid out by what they read."""
Rewrite = Callable[[Graph, AttentionCall, Node, Node], None]


def _made(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new node, where nodes are inserted now, that knows its value's type and shape."""
    node = graph.call_function(target, args, kwargs)
    values = map_arg((args, kwargs), lambda each: each.meta["val"])
    node.meta["val"] = target(*values[0], **values[1])
    return node


def _replace(
    graph: Graph, call: AttentionCall, key: Node, value: Node, target: Any, rest: tuple[Any, ...],
    blanked: bool = False, **kwargs: Any,
) -> None:  # fmt: skip
    """Put ``target`` of query, key, value and ``rest`` in the call's place; ``blanked``: with 0 in the rows that see
    no key."""
    output = _output(call)
    with graph.inserting_before(call.node):
        query, key, value = _aligned(graph, call, key, value)
        if target is SDPA and query.meta["val"].shape[1] != key.meta["val"].shape[1]:
            kwargs["enable_gqa"] = True
        new = made = _made(graph, target, query, key, value, *rest, **kwargs)
        if blanked:
            new = _made(graph, ops.BLANKED, new, call.mask)
        for _ in range(4 - output.meta["val"].dim()):
            new = _made(graph, aten.squeeze.dim, new, 0)
    new.meta = dict(output.meta)
    output.replace_all_uses_with(new)
    for node in dict.fromkeys((*call.node.users, call.node) if output is not call.node else (call.node,)):
        graph.erase_node(node)
    _allow_any_layout(made)


def _output(call: AttentionCall) -> Node:
    """The node that is the attention's result: a kernel's call also gives what only its backward pass needs."""
    if isinstance(call.node.meta["val"], torch.Tensor):
        return call.node
    used = [user for user in call.node.users if user.users]
    if len(used) != 1 or used[0].args[1] != 0:
        raise RunError("unsupported_op", f"{call.name}: more than the result of {call.op} is used")
    return used[0]


def _aligned(graph: Graph, call: AttentionCall, key: Node, value: Node) -> tuple[Node, Node, Node]:
    """Query [B, Hq, L, D], key [B, Hkv, S, D] and value [B, Hkv, S, Dv] with Hq % Hkv == 0.

    PyTorch broadcasts batch and heads, repeats the heads of key and value each by itself where grouped heads are asked
    for, and takes tensors without a batch; a tensor that is in that form already is left as it is.  Raises
    :class:`passes.errors.RunError` of kind ``unsupported_op`` for tensors of more dimensions.
    """
    tensors = [call.query, key, value]
    most = max(tensor.meta["val"].dim() for tensor in tensors)
    if most > 4:
        raise RunError("unsupported_op", f"{call.name}: attention over {most}-D tensors; the layers take four")
    for i, tensor in enumerate(tensors):
        for _ in range(4 - tensor.meta["val"].dim()):
            tensors[i] = tensor = _made(graph, aten.unsqueeze.default, tensor, 0)
    batch = max(tensors, key=lambda tensor: not _is_one(tensor.meta["val"].shape[0]))
    many, *few = (tensor.meta["val"].shape[1] for tensor in tensors)
    if few[0] != few[1]:
        few = [max(few) if min(few) == 1 else many] * 2
    wanted = (max(many, few[0]), *few)
    return tuple(_spread(graph, each, batch, heads) for each, heads in zip(tensors, wanted, strict=True))  # type: ignore[return-value]


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _size(graph: Graph, tensor: Node, axis: int) -> Any:
    """A size of ``tensor``: a number, or the node that asks for it."""
    size = tensor.meta["val"].shape[axis]
    return size if isinstance(size, int) else _made(graph, aten.sym_size.int, tensor, axis)


def _spread(graph: Graph, tensor: Node, batch: Node, heads: int) -> Node:
    """``tensor`` [B or 1, H, N, D] with the batch of ``batch`` and ``heads`` heads: H of them, each repeated in its
    place."""
    first, have = tensor.meta["val"].shape[:2]
    if _is_one(first) and not _is_one(batch.meta["val"].shape[0]):
        tensor = _made(graph, aten.expand.default, tensor, [_size(graph, batch, 0), -1, -1, -1])
    if have == heads:
        return tensor
    lifted = _made(graph, aten.unsqueeze.default, tensor, 2)
    repeated = _made(graph, aten.expand.default, lifted, [-1, -1, heads // have, -1, -1])
    rows, channels = (_size(graph, tensor, axis) for axis in (2, 3))
    return _made(graph, aten.reshape.default, repeated, [_size(graph, tensor, 0), heads, rows, channels])


def _allow_any_layout(node: Node) -> None:
    """Turn the views that follow ``node`` into reshapes: each attention kernel has its own output strides."""
    for user in node.users:
        if user.target is aten.view.default:
            user.target = aten.reshape.default
        if user.target in LAYOUTS:
            _allow_any_layout(user)


def _native(causal: str, keep_mask: bool) -> Rewrite:
    def rewrite(graph: Graph, call: AttentionCall, key: Node, value: Node) -> None:
        mask = _full_mask(graph, call) if keep_mask and call.mask is not None else None
        blanked = mask is not None and causal == "none" and not call.sees_keys
        _replace(graph, call, key, value, ops.NATIVE, (mask, causal, call.scale), blanked)

    return rewrite


def _full_mask(graph: Graph, call: AttentionCall) -> Node:
    """The mask with four dimensions, the last two at full size: only batch and heads may broadcast in the native
    layer."""
    assert call.mask is not None
    mask = call.mask
    with graph.inserting_before(call.node):
        for _ in range(4 - mask.meta["val"].dim()):
            mask = _made(graph, aten.unsqueeze.default, mask, 0)
        rows, columns = mask.meta["val"].shape[-2:]
        if not _is_one(rows) and not _is_one(columns):
            return mask
        sizes = [_size(graph, tensor, -2) for tensor in (call.query, call.key)]
        return _made(graph, aten.expand.default, mask, [-1, -1, *sizes])


def _rewritten(is_causal: bool) -> Rewrite:
    def rewrite(graph: Graph, call: AttentionCall, key: Node, value: Node) -> None:
        _replace(graph, call, key, value, SDPA, (None, 0.0, is_causal), scale=call.scale)

    return rewrite


def _decomposed(graph: Graph, call: AttentionCall, key: Node, value: Node) -> None:
    rest = (call.mask, call.is_causal, call.scale, call.sees_keys)
    _replace(graph, call, call.key, call.value, ops.DECOMPOSED, rest)


def _cached(graph: Graph, call: AttentionCall, key: Node, value: Node) -> None:
    update = cache_ops.update_behind(call.key)
    assert update is not None
    _replace(graph, call, key, value, cache_ops.CACHED, (update.args[2], call.scale))


def _untouched(graph: Graph, call: AttentionCall, key: Node, value: Node) -> None:
    return None


REWRITES: dict[Action, Rewrite] = {
    Action.NATIVE_CAUSAL: _native("upper_left", keep_mask=True),
    Action.NATIVE_FULL: _native("none", keep_mask=False),
    Action.NATIVE_MASK: _native("none", keep_mask=True),
    Action.REWRITTEN_CAUSAL: _rewritten(is_causal=True),
    Action.REWRITTEN_FULL: _rewritten(is_causal=False),
    Action.CACHED: _cached,
    Action.DECOMPOSED: _decomposed,
    Action.UNTOUCHED: _untouched,
}
