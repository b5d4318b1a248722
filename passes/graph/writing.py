"""Writes a node in an attention call's place: the one way in which every lowering does it.

The ops that are written compute what ``scaled_dot_product_attention`` does with the call's own tensors
(:mod:`passes.graph.ops`), once those are brought into the one form that all of them take (:func:`_aligned`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from passes.errors import RunError
from passes.graph import ops
from passes.proof.calls import AttentionCall

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def made_in(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new node, where nodes are inserted now, that knows its value's type and shape."""
    node = graph.call_function(target, args, kwargs)
    values = map_arg((args, kwargs), lambda each: each.meta["val"])
    node.meta["val"] = target(*values[0], **values[1])
    return node


def put(
    graph: Graph, call: AttentionCall, target: Any, rest: tuple[Any, ...], blanked: bool = False, **kwargs: Any
) -> None:
    """Put ``target`` of query, key, value and ``rest`` in the call's place; ``blanked``: with 0 in the rows that see
    no key."""
    output = _output(call)
    with graph.inserting_before(call.node):
        query, key, value = _aligned(graph, call)
        if target is SDPA and query.meta["val"].shape[1] != key.meta["val"].shape[1]:
            kwargs["enable_gqa"] = True
        new = made_in(graph, target, query, key, value, *rest, **kwargs)
        if blanked:
            new = made_in(graph, ops.BLANKED, new, call.mask)
        for _ in range(4 - output.meta["val"].dim()):
            new = made_in(graph, aten.squeeze.dim, new, 0)
    new.meta = dict(output.meta)
    output.replace_all_uses_with(new)
    for node in dict.fromkeys((*call.node.users, call.node) if output is not call.node else (call.node,)):
        graph.erase_node(node)


def _output(call: AttentionCall) -> Node:
    """The node that is the attention's result: a kernel's call also gives what only its backward pass needs."""
    if isinstance(call.node.meta["val"], torch.Tensor):
        return call.node
    used = [user for user in call.node.users if user.users]
    if len(used) != 1 or used[0].args[1] != 0:
        raise RunError("unsupported_op", f"{call.name}: more than the result of {call.op} is used")
    return used[0]


def _aligned(graph: Graph, call: AttentionCall) -> tuple[Node, Node, Node]:
    """Query [B, Hq, L, D], key [B, Hkv, S, D] and value [B, Hkv, S, Dv] with Hq % Hkv == 0.

    PyTorch broadcasts batch and heads, repeats the heads of key and value each by itself where grouped heads are asked
    for, and takes tensors without a batch; a tensor that is in that form already is left as it is.  Raises
    :class:`passes.errors.RunError` of kind ``unsupported_op`` for tensors of more dimensions.
    """
    tensors = [call.query, call.key, call.value]
    most = max(tensor.meta["val"].dim() for tensor in tensors)
    if most > 4:
        raise RunError("unsupported_op", f"{call.name}: attention over {most}-D tensors; the layers take four")
    for i, tensor in enumerate(tensors):
        for _ in range(4 - tensor.meta["val"].dim()):
            tensors[i] = tensor = made_in(graph, aten.unsqueeze.default, tensor, 0)
    batch = max(tensors, key=lambda tensor: not is_one(tensor.meta["val"].shape[0]))
    many, *few = (tensor.meta["val"].shape[1] for tensor in tensors)
    if few[0] != few[1]:
        few = [max(few) if min(few) == 1 else many] * 2
    wanted = (max(many, few[0]), *few)
    return tuple(_spread(graph, each, batch, heads) for each, heads in zip(tensors, wanted, strict=True))  # type: ignore[return-value]


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def size_of(graph: Graph, tensor: Node, axis: int) -> Any:
    """A size of ``tensor``: a number, or the node that asks for it."""
    size = tensor.meta["val"].shape[axis]
    return size if isinstance(size, int) else made_in(graph, aten.sym_size.int, tensor, axis)


def _spread(graph: Graph, tensor: Node, batch: Node, heads: int) -> Node:
    """``tensor`` [B or 1, H, N, D] with the batch of ``batch`` and ``heads`` heads: H of them, each repeated in its
    place."""
    first, have = tensor.meta["val"].shape[:2]
    if is_one(first) and not is_one(batch.meta["val"].shape[0]):
        tensor = made_in(graph, aten.expand.default, tensor, [size_of(graph, batch, 0), -1, -1, -1])
    if have == heads:
        return tensor
    lifted = made_in(graph, aten.unsqueeze.default, tensor, 2)
    repeated = made_in(graph, aten.expand.default, lifted, [-1, -1, heads // have, -1, -1])
    rows, channels = (size_of(graph, tensor, axis) for axis in (2, 3))
    return made_in(graph, aten.reshape.default, repeated, [size_of(graph, tensor, 0), heads, rows, channels])


def allow_any_layout(graph: Graph) -> None:
    """Turn views into reshapes, which they are wherever they can be: each attention kernel has its own output strides,
    and what is computed from its result, element by element, takes them over."""
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
