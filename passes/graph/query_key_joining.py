"""Computes once what is done alike to two neighbouring pieces of one product.

Query and key come out of one product side by side, and the same is done to the heads of both: a norm of each head
(Qwen3), the rotary position.  TensorRT makes kernels for each; over the heads of both together it makes half as many,
which is what they cost at one token (docs/generation.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.tools_common import stable_topological_sort

from passes.graph.weights import put, value_of
from passes.proof.op_kinds import ARITHMETIC, RESHAPES

aten = torch.ops.aten
SLICE, CAT, PERMUTE, MEAN = aten.slice.Tensor, aten.cat.default, aten.permute.default, aten.mean.dim


@dataclass(frozen=True)
class Twins:
    """Two tensors that differ in the size of ``axis`` alone, and ``both``: the first, then the second, along it."""

    first: Node
    second: Node
    both: Node
    axis: int


def join(graph: GraphModule, products: list[Node]) -> int:
    """Compute once what is done alike to the heads of two neighbouring slices of a product [..., channels], in place.

    The values stay what they are, element by element; returns how many pairs were joined.
    """
    found = [each for product in products if (start := _start(graph, product)) for each in _followed(graph, start)]
    if not found:
        return 0
    members = {member for each in found for member in (each.first, each.second)}
    for each in found:
        _part(graph, each, members)
    for node in reversed(list(graph.graph.nodes)):
        if node in members and not node.users:
            graph.graph.erase_node(node)
    stable_topological_sort(graph)  # what was joined is made where the first of the two was
    return len(found)


def _start(graph: GraphModule, product: Node) -> Twins | None:
    """The heads of the first two slices of ``product`` that are neighbours and are made into heads."""
    last = len(_shape(product)) - 1
    pieces = [
        user
        for user in product.users
        if user.target is SLICE and user.args[1] in (-1, last) and [type(at) for at in user.args[2:]] == [int, int]
    ]
    pairs = pairwise(sorted(pieces, key=lambda piece: _args(piece)[2]))
    return next(filter(None, (_heads(graph, product, first, second) for first, second in pairs)), None)


def _heads(graph: GraphModule, product: Node, first: Node, second: Node) -> Twins | None:
    """What two slices of ``product`` [..., channels] are made into, if that is heads [..., H, D] and they are
    neighbours."""
    users = [next(iter(piece.users)) for piece in (first, second) if len(piece.users) == 1]
    if first.args[3] != second.args[2] or [user.target in RESHAPES for user in users] != [True, True]:
        return None
    one, other = users
    axis = len(_shape(one)) - 2
    shape, sizes = _shape(one), _shape(other)
    around = (*_shape(product)[:-1], shape[-1])  # the channels alone are split
    if any((*each[:-2], each[-1]) != around for each in (shape, sizes)):
        return None
    with graph.graph.inserting_before(one):
        whole = graph.graph.call_function(SLICE, (product, -1, first.args[2], second.args[3]))
        whole.meta["val"] = _joined(first, second, axis)
        heads = [*shape[:axis], shape[axis] + sizes[axis], shape[-1]]
        both = graph.graph.call_function(_target(one), (whole, heads))
        both.meta["val"] = _joined(one, other, axis)
    return Twins(one, other, both, axis)


def _followed(graph: GraphModule, start: Twins) -> list[Twins]:
    """``start``, and all twins that come of it by the same operations; none if there are no others."""
    found = {start.first: start}
    for node in list(graph.graph.nodes):
        origin = next((found[arg] for arg in node.all_input_nodes if arg in found), None)
        axis = _axis_behind(node, origin) if origin else None
        if origin is None or axis is None:
            continue
        for other in [user for user in origin.second.users if user is not node and _same_kind(user, node)]:
            with graph.graph.inserting_before(node):
                args = _both(graph, node, node.args, other.args, found, origin)
                if args is not None:
                    both = graph.graph.call_function(_target(node), args, node.kwargs)
                    both.meta["val"] = _joined(node, other, axis)
                    found[node] = Twins(node, other, both, axis)
                    break
    if len(found) > 1:
        return list(found.values())
    for made in (start.both, _args(start.both)[0]):
        graph.graph.erase_node(made)
    return []


def _same_kind(node: Node, other: Node) -> bool:
    return node.target is other.target and node.kwargs == other.kwargs and len(node.args) == len(other.args)


def _axis_behind(node: Node, origin: Twins) -> int | None:
    """Where the axis of ``origin`` is in the output of ``node``, if none of its elements depend on others along it."""
    rank, axis, args = len(_shape(origin.first)), origin.axis, _args(node)
    if node.target in ARITHMETIC:
        return axis if len(_shape(node)) == rank else None
    if node.target is PERMUTE:
        return [place % rank for place in args[1]].index(axis)
    if node.target is MEAN and len(args) == 3 and args[2]:
        return axis if axis not in [place % rank for place in args[1]] else None
    if node.target in (SLICE, CAT) and len(args) > 1:
        return axis if args[1] % rank != axis else None
    return None


def _both(graph: GraphModule, node: Node, one: Any, other: Any, found: dict[Node, Twins], origin: Twins) -> Any:
    """The argument of ``node`` done to both, for the arguments of each; None if they are not alike."""
    if isinstance(one, (list, tuple)):
        if not isinstance(other, (list, tuple)) or len(one) != len(other):
            return None
        made = [_both(graph, node, a, b, found, origin) for a, b in zip(one, other, strict=True)]
        return None if any(each is None for each in made) else type(one)(made)
    if not isinstance(one, Node):
        return one if one == other else None
    if one in found:
        return found[one].both if found[one].second is other and found[one].axis == origin.axis else None
    if node.target not in ARITHMETIC:
        return None
    if one is other:  # the same for both: it must not differ along the axis
        place = origin.axis - len(_shape(origin.first)) + len(_shape(one))
        return one if place < 0 or _shape(one)[place] == 1 else None
    return _tiled(graph, one, other, origin)


def _tiled(graph: GraphModule, one: Node, other: Any, origin: Twins) -> Node | None:
    """A weight [D] of each, such as the gain of a norm, as one [H, ..., D] for all heads; None if it is not that."""
    between = len(_shape(origin.first)) - origin.axis - 2
    first, second = value_of(graph, one), value_of(graph, other)
    if between < 0 or first is None or second is None or first.dim() != 1 or first.shape != second.shape:
        return None
    counts = [_shape(twin)[origin.axis] for twin in (origin.first, origin.second)]
    tiles = [w.detach().expand(n, *(1,) * between, len(w)) for w, n in zip((first, second), counts, strict=True)]
    return put(graph, f"{one.name}_and_{other.name}", torch.cat(tiles))


def _part(graph: GraphModule, twins: Twins, members: set[Node]) -> None:
    """Let what reads one of ``twins``, and is not among ``members``, read its part of both."""
    start = 0
    for member in (twins.first, twins.second):
        size = _shape(member)[twins.axis]
        outside = [user for user in member.users if user not in members]
        if outside:
            with graph.graph.inserting_before(outside[0]):
                piece = graph.graph.call_function(SLICE, (twins.both, twins.axis, start, start + size))
            piece.meta["val"] = member.meta["val"]
            for user in outside:
                user.replace_input_with(member, piece)
        start += size


def _args(node: Node) -> tuple[Any, ...]:
    return node.args


def _target(node: Node) -> Any:
    return node.target


def _shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _joined(first: Node, second: Node, axis: int) -> Any:
    """A value with the shape of ``first`` and ``second`` along ``axis``."""
    shape = list(_shape(first))
    shape[axis] += _shape(second)[axis]
    return first.meta["val"].new_empty(shape)
