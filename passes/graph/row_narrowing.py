"""Computes no rows that nothing reads.

Of a prompt, generation reads the logits behind its last token alone, and Hugging Face's models choose that row after
the last norm: the output projection and the whole MLP of the last layer have then run over every token.  Here the
choice moves up, through what works on each token by itself, to the last attention call.

Legal because each of these operations gives row ``i`` of its result from row ``i`` of what it reads: choosing rows
before it and after it is the same.  A node is narrowed only where all that reads it reads it so: row by row, along the
same axis, and in no other place, such as the weight of a product.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from passes.private.of_torch import writes
from passes.proof.op_kinds import POINTWISE, RESHAPES

aten = torch.ops.aten

PIECES = (aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


@dataclass(frozen=True)
class _Choice:
    """Which rows are read: ``size`` of them; ``of`` inserts the node that takes them along an axis of another node."""

    axis: int
    size: int
    of: Callable[[Node, int], Node]


def narrow(graph: GraphModule) -> int:
    """Move every choice of rows as far up as it can go, in place; returns how many nodes work on fewer rows for it.

    None in a graph that writes to its tensors: a row may be another further up.
    """
    if any(writes(node.target) for node in graph.graph.nodes):
        return 0
    return sum(_move_up(graph, node) for node in list(graph.graph.nodes))


def _choice(graph: GraphModule, node: Node) -> _Choice | None:
    """``node`` as a choice of rows, if it is one: the last row, or those that a tensor names.

    Further up rows are taken by the same operation: what a negative or a foreign place means is then the same.
    """
    if node.target is aten.slice.Tensor:
        axis, start = _axis(node), node.args[2] if len(node.args) > 2 else None
        if start != -1 or node.meta["val"].shape[axis] != 1:
            return None

        def last(source: Node, along: int) -> Node:
            return graph.graph.call_function(aten.slice.Tensor, (source, along, -1, torch.iinfo(torch.int64).max))

        return _Choice(axis, 1, last)
    if node.target is aten.index.Tensor:
        places: Any = node.args[1]
        named = [axis for axis, each in enumerate(places) if each is not None]
        if len(named) != 1:
            return None
        rows = places[named[0]]
        if rows.op != "placeholder":  # it might not be there yet further up
            return None
        if rows.meta["val"].dim() != 1 or rows.meta["val"].dtype not in (torch.int32, torch.int64):
            return None

        def chosen(source: Node, along: int) -> Node:
            return graph.graph.call_function(aten.index.Tensor, (source, [*[None] * along, rows]))

        return _Choice(named[0], rows.meta["val"].shape[0], chosen)
    return None


def _move_up(graph: GraphModule, node: Node) -> int:
    choice = _choice(graph, node)
    if choice is None or not isinstance(choice.size, int) or any(user.op == "output" for user in node.users):
        return 0
    source: Any = node.args[0]
    narrowed: dict[Node, int] = {}  # the axis of the rows
    reads: dict[Node, dict[Node, int]] = {}
    wanted = {source: choice.axis}
    order = {each: place for place, each in enumerate(graph.graph.nodes)}
    while wanted:
        latest = max(wanted, key=order.__getitem__)
        axis = wanted.pop(latest)
        read = _rows_read(latest, axis)
        readers = [user for user in latest.users if user is not node and not _holds_for_fewer(user)]
        if read is None or any(reads.get(user, {}).get(latest) != axis for user in readers):
            continue
        narrowed[latest], reads[latest] = axis, read
        for argument, along in read.items():
            if wanted.setdefault(argument, along) != along:
                return 0
    for each in [each for each in narrowed if each.target is operator.getitem]:
        if each.args[0] not in narrowed:  # rows are taken of tensors, and not of all the pieces of one that stays
            del narrowed[each]
    if not any(each.target in (aten.linear.default, aten.addmm.default) for each in narrowed):
        return 0  # nothing to be won
    taken: dict[tuple[Node, int], Node] = {}
    for each in sorted(narrowed, key=order.__getitem__):
        for argument, along in reads[each].items():
            if argument in narrowed:
                continue
            if (argument, along) not in taken:
                with graph.graph.inserting_before(each):  # the first that reads it
                    taken[argument, along] = choice.of(argument, along)
                taken[argument, along].meta["val"] = _fewer(argument.meta["val"], along, choice.size)
            each.replace_input_with(argument, taken[argument, along])
        if each.target in RESHAPES:
            args: Any = each.args
            sizes = [*args[1]]
            sizes[narrowed[each]] = choice.size
            each.target, each.args = aten.reshape.default, (args[0], sizes)
    for each, axis in narrowed.items():
        each.meta["val"] = _fewer(each.meta["val"], axis, choice.size)
    node.replace_all_uses_with(source)
    graph.graph.erase_node(node)
    return len(narrowed)


def _holds_for_fewer(node: Node) -> bool:
    """Whether ``node`` is an assertion about a tensor that says nothing of its sizes or strides."""
    sized = (*node.args[1:3], node.kwargs.get("size"), node.kwargs.get("stride"))
    return node.target is aten._assert_tensor_metadata.default and all(each is None for each in sized)


def _fewer(value: Any, axis: int, size: int) -> Any:
    if isinstance(value, list | tuple):  # pieces
        return [_fewer(each, axis, size) for each in value]
    return value.new_empty((*value.shape[:axis], size, *value.shape[axis + 1 :]))


def _rows_read(node: Node, axis: int) -> dict[Node, int] | None:
    """What ``node`` reads row by row, and along which axis its rows lie there, where those of ``node`` lie along
    ``axis``; None where its rows are not made each from its own."""
    args: Any = node.args
    if node.op != "call_function" or not args:
        return None
    if node.target in POINTWISE:
        return _aligned(node.all_input_nodes, axis, node.meta["val"].shape)
    at = 1 if node.target is aten.addmm.default else 0
    source = args[at]
    if not isinstance(source, Node) or _times_read(node, source) != 1:
        return None
    along = _axis_read(node, axis, source)
    return None if along is None else {source: along}


def _times_read(node: Node, source: Node) -> int:
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found.count(source)


def _axis_read(node: Node, axis: int, source: Node) -> int | None:
    """Along which axis of ``source`` the rows lie from which ``node``, no pointwise operation, makes those along its
    ``axis``, if each is made from its own."""
    target: Any = node.target
    args: Any = node.args
    value, made = source.meta.get("val"), node.meta.get("val")
    if target is operator.getitem:
        return axis if source.target in PIECES else None
    if not isinstance(value, torch.Tensor):
        return None
    if target in PIECES:
        return axis if _axis(node) != axis else None
    if not isinstance(made, torch.Tensor):
        return None
    before, shape = value.shape, made.shape
    rank = len(shape)
    if target is aten.dropout.default:
        return axis if not args[2] else None  # of inference: nothing
    if target is aten.linear.default:
        return axis if axis != rank - 1 and _is_flat(args[2:]) else None
    if target is aten.addmm.default:
        return axis if axis == 0 and _is_flat(args[:1]) else None
    if target is aten.layer_norm.default:
        return axis if axis < rank - len(args[1]) else None
    if target is aten.mean.dim:
        dims = [dim % len(before) for dim in args[1] or range(len(before))]  # none named: all of them
        keeps = len(args) > 2 and args[2]
        return axis if axis not in dims and (keeps or min(dims) > axis) else None
    if target in RESHAPES:  # elements keep their order, so a row is the same where as much lies before it and in it
        ahead = prod(shape[:axis])
        same = (i for i, size in enumerate(before) if _equal(size, shape[axis]) and _equal(prod(before[:i]), ahead))
        return next(same, None)
    if target is aten.transpose.int:
        order = list(range(rank))
        first, second = args[1:3]
        order[first], order[second] = order[second], order[first]
        return int(order[axis])
    if target is aten.permute.default:
        return int(range(rank)[args[1][axis]])
    return None


def _is_flat(bias: tuple[Any, ...]) -> bool:
    """Whether ``bias``, one or none, is the same for every row."""
    return all(each is None or each.meta["val"].dim() == 1 for each in bias)


def _axis(node: Node) -> int:
    """Along which axis one of ``PIECES`` takes its piece or pieces."""
    args: Any = node.args
    place = 1 if node.target is aten.slice.Tensor else 2
    axis: Any = args[place] if len(args) > place else node.kwargs.get("dim", 0)
    return int(range(args[0].meta["val"].dim())[axis])


def _aligned(arguments: list[Node], axis: int, shape: torch.Size) -> dict[Node, int] | None:
    """Of a pointwise operation, whose arguments are broadcast from the right; None where no argument has the rows."""
    read = {}
    for argument in arguments:
        value = argument.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return None
        along = axis - (len(shape) - value.dim())
        if along < 0 or _equal(value.shape[along], 1):
            continue
        if not _equal(value.shape[along], shape[axis]):
            return None
        read[argument] = along
    return read or None


def _equal(first: Any, second: Any) -> bool:
    """Whether two sizes, integers or symbols, are known to be the same."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(first == second))
