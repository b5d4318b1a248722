"""Brings a lowered graph into the form that Torch-TensorRT's converters need, without changing what it computes.

* A -1 in the sizes of a view hides from TensorRT what the trace knows: its attention layer and the update of its cache
  want the number of heads, and some views with -1 and a dynamic size are refused altogether.
* What is written into a slice of a tensor is scattered element by element, which fails where a length is dynamic.
  Along an axis of known size it stands between what the tensor has before and behind it; into every n-th place
  (Qwen 3.5's rotary angles) it is chosen out of both.
* What is written at the places of a mask is chosen there (Gemma 3 has no embedding of its image tokens): the layer that
  would write it takes places, and how many those are is not known before they are seen.
* The last n of a tensor of which two axes are open come out with the wrong size along the other: where they begin is
  counted from the front.
* A number that is scattered is made a constant of double precision where the sizes are known, which TensorRT has not.
* Torch-TensorRT knows of a bitwise operation on bools only by a note that constants do not have; on bools they are the
  logical ones.
* The largest element along an axis and its place, together, are the first of those that ``topk`` gives.
* The greater of two sizes of which one is known to be: that one.  There is no layer that would choose.
* Whole numbers over whole numbers are none in PyTorch, and truncated ones in TensorRT: they are cast before.
* A whole number rounded is that number; TensorRT rounds no others (Ministral 3 scales queries by such a one).
* ``broadcast_in_dim``, in which decompositions keep an axis that they summed over, is there in other words.
* What ``empty`` holds is undefined, so zeros will do; there is no layer for it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from passes.graph import weights
from passes.graph.writing import is_one
from passes.proof.op_kinds import RESHAPES
from passes.proof.sizes import bounds_of

aten = torch.ops.aten

ROUNDINGS = (aten.floor.default, aten.ceil.default, aten.trunc.default, aten.round.default)
VIEWS = (*RESHAPES, aten.expand.default)
LOGICAL = {
    aten.bitwise_and.Tensor: aten.logical_and.default,
    aten.bitwise_or.Tensor: aten.logical_or.default,
    aten.bitwise_xor.Tensor: aten.logical_xor.default,
    aten.bitwise_not.default: aten.logical_not.default,
}


def prepare(graph: GraphModule) -> int:
    """Write known sizes, slices and contents into ``graph``, in place; returns into how many operations."""
    changed = 0
    for node in list(graph.graph.nodes):
        if node.target in VIEWS and "val" in node.meta:
            _write_known_sizes(node)
        elif node.target is aten.slice_scatter.default and "val" in node.meta:
            _put_between(graph, node)
        elif node.target is aten.slice.Tensor and _is_an_end_among_open_axes(node):
            _count_from_front(node)
        elif node.target is torch.ops.prims.broadcast_in_dim.default:
            _lift_and_expand(node)
        elif node.target is aten.index_put.default and _is_one_for_all_places(node):
            _choose_at_places(node)
        elif node.target is aten.scatter.value and "val" in node.args[2].meta:
            _spell_out_number(node)
        elif node.target in LOGICAL and node.meta["val"].dtype == torch.bool:  # then so are what it reads
            node.target = LOGICAL[node.target]
        elif node.target is aten.div.Tensor and node.meta["val"].is_floating_point() and _of_whole_numbers(node):
            _cast_first(node)
        elif node.target in ROUNDINGS and not node.args[0].meta["val"].is_floating_point():
            node.target = aten.alias.default
        elif node.target is torch.sym_max:
            _choose_greater(node)
        elif node.target is aten.max.dim:
            _as_first_of_topk(node)
        elif node.target is aten.empty.memory_format:
            node.target, node.args = aten.full.default, (node.args[0], 0)
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}
        else:
            continue
        changed += 1
    graph.recompile()
    return changed


def _write_known_sizes(node: Node) -> None:
    source, asked, *rest = node.args
    known = node.meta["val"].shape
    sizes = [size if isinstance(size, int) else wanted for wanted, size in zip(asked, known, strict=True)]  # type: ignore[arg-type]
    node.args = (source, sizes, *rest)


def _put_between(module: GraphModule, node: Node) -> None:
    whole, piece = node.args[:2]
    made, graph = node.meta["val"], node.graph
    default: tuple[Any, ...] = (0, None, None, 1)
    dim, start, end, step = node.args[2:] + default[len(node.args) - 2 :]
    size = made.shape[dim]
    if not all(place is None or isinstance(place, int) for place in (size, start, end, step)):
        return
    places = range(size)[slice(start, end, step)]

    def kept(begin: int, stop: int) -> list[Any]:
        if begin == stop:
            return []
        part = graph.call_function(aten.slice.Tensor, (whole, dim, begin, stop))
        part.meta["val"] = made.narrow(dim, begin, stop - begin)
        return [part]

    with graph.inserting_before(node):
        if step == 1:
            pieces = [*kept(0, places.start), piece, *kept(places.start + len(places), size)]
            node.target, node.args = aten.cat.default, (pieces, dim)
            return
        both = graph.call_function(aten.cat.default, ([whole, piece], dim))
        both.meta["val"] = torch.cat([made, piece.meta["val"]], dim)  # type: ignore[union-attr]
        order = list(range(size))
        order[start:end:step] = range(size, size + len(places))
        chosen = weights.put(module, f"{node.name}_order", torch.tensor(order, device=made.device))
    node.target, node.args = aten.index_select.default, (both, dim, chosen)


def _is_an_end_among_open_axes(node: Node) -> bool:
    """Whether a slice is the last n along an axis that has as many at every length, and another axis is open too."""
    default: tuple[Any, ...] = (0, None, None, 1)
    given: tuple[Any, ...] = node.args
    source, dim, start, end, step = given + default[len(given) - 1 :]
    sizes = source.meta["val"].shape
    is_open = [not isinstance(size, int) for size in sizes]
    if not (isinstance(start, int) and start < 0 and step == 1 and is_open[dim] and sum(is_open) > 1):
        return False
    least, _ = bounds_of(sizes[dim])
    return end in (None, torch.iinfo(torch.int64).max) and _reaches(least, -start)


def _count_from_front(node: Node) -> None:
    given: tuple[Any, ...] = node.args
    source, dim, start = given[:3]
    with node.graph.inserting_before(node):
        size = node.graph.call_function(aten.sym_size.int, (source, dim))
        size.meta["val"] = source.meta["val"].shape[dim]
        first = node.graph.call_function(operator.add, (size, start))
        first.meta["val"] = size.meta["val"] + start
    node.args = (source, dim, first, size)


def _lift_and_expand(node: Node) -> None:
    given: tuple[Any, ...] = node.args
    source, sizes, axes = given
    with node.graph.inserting_before(node):
        for axis in sorted(set(range(len(sizes))) - set(axes)):
            lifted = node.graph.call_function(aten.unsqueeze.default, (source, axis))
            lifted.meta["val"] = source.meta["val"].unsqueeze(axis)
            source = lifted
    node.target, node.args = aten.expand.default, (source, sizes)
    _write_known_sizes(node)


def _is_one_for_all_places(node: Node) -> bool:
    """Whether ``index_put`` writes the same thing at each place of one mask, which is over the first axes."""
    given: tuple[Any, ...] = node.args
    whole, (mask, *others), written, *adds = given
    if others or mask is None or any(adds) or mask.meta["val"].dtype != torch.bool:
        return False
    own, piece = whole.meta["val"].dim() - mask.meta["val"].dim(), written.meta["val"]
    return bool(piece.dim() <= own or (piece.dim() == own + 1 and is_one(piece.shape[0])))


def _choose_at_places(node: Node) -> None:
    given: tuple[Any, ...] = node.args
    whole, (mask,), written = given[:3]
    with node.graph.inserting_before(node):
        for _ in range(node.meta["val"].dim() - mask.meta["val"].dim()):
            lifted = node.graph.call_function(aten.unsqueeze.default, (mask, -1))
            lifted.meta["val"] = mask.meta["val"].unsqueeze(-1)
            mask = lifted
    node.target, node.args = aten.where.self, (mask, written, whole)


def _as_first_of_topk(node: Node) -> None:
    graph, (source, axis, *keep) = node.graph, node.args
    values = node.meta["val"]
    kept = bool(keep and keep[0])
    with graph.inserting_before(node):
        first = graph.call_function(aten.topk.default, (source, 1, axis))
        first.meta["val"] = tuple(each if kept else each.unsqueeze(axis) for each in values)
        for user in list(node.users):  # each takes one of the two
            made = graph.call_function(operator.getitem, (first, user.args[1]))
            made.meta["val"] = first.meta["val"][user.args[1]]
            if not kept:
                made = graph.call_function(aten.squeeze.dim, (made, axis))
                made.meta["val"] = values[user.args[1]]
            user.replace_all_uses_with(made)
            graph.erase_node(user)
    graph.erase_node(node)


def _of_whole_numbers(node: Node) -> bool:
    for side in node.args[:2]:
        value = side.meta["val"] if isinstance(side, Node) else side
        if value.is_floating_point() if isinstance(value, torch.Tensor) else isinstance(value, float):
            return False
    return True


def _cast_first(node: Node) -> None:
    """Both sides in the type of the quotient ``node``; a number beside a tensor takes its type."""
    for place, side in enumerate(node.args[:2]):
        if isinstance(side, Node) and isinstance(side.meta["val"], torch.Tensor):
            with node.graph.inserting_before(node):
                cast = node.graph.call_function(aten._to_copy.default, (side,), {"dtype": node.meta["val"].dtype})
                cast.meta["val"] = side.meta["val"].to(node.meta["val"].dtype)
            node.update_arg(place, cast)


def _reaches(least: int | None, most: int | None) -> bool:
    return least is not None and most is not None and least >= most


def _choose_greater(node: Node) -> None:
    values = [each.meta["val"] if isinstance(each, Node) else each for each in node.args]
    (least, most), (other_least, other_most) = (bounds_of(each) for each in values)
    greater = 0 if _reaches(least, other_most) else 1 if _reaches(other_least, most) else None
    if greater is None:
        return
    chosen = node.args[greater]
    for user in list(node.users):
        user.args = map_aggregate(user.args, lambda each: chosen if each is node else each)
        user.kwargs = map_aggregate(user.kwargs, lambda each: chosen if each is node else each)
    node.graph.erase_node(node)


def _spell_out_number(node: Node) -> None:
    whole, dim, index, number = node.args
    sizes, dtype = index.meta["val"].shape, node.meta["val"].dtype  # type: ignore[union-attr]
    if not all(isinstance(size, int) for size in sizes):
        return
    with node.graph.inserting_before(node):
        numbers = node.graph.call_function(aten.full.default, (list(sizes), number), {"dtype": dtype})
        numbers.meta["val"] = node.meta["val"].new_empty(sizes)
    node.target, node.args = aten.scatter.src, (whole, dim, index, numbers)
