"""Brings a lowered graph into the form that Torch-TensorRT's converters need, without changing what it computes.

* A -1 in the sizes of a view hides from TensorRT what the trace knows: its attention layer and the update of its cache
  want the number of heads, and some views with -1 and a dynamic size are refused altogether.
* What is written into a slice of a tensor is scattered element by element, which fails where a length is dynamic.
  Along an axis of known size it stands between what the tensor has before and behind it.
* A number that is scattered is made a constant of double precision where the sizes are known, which TensorRT has not.
* What ``empty`` holds is undefined, so zeros will do; there is no layer for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.proof.op_kinds import RESHAPES

aten = torch.ops.aten

VIEWS = (*RESHAPES, aten.expand.default)


def prepare(graph: GraphModule) -> int:
    """Write known sizes, slices and contents into ``graph``, in place; returns into how many operations."""
    changed = 0
    for node in list(graph.graph.nodes):
        if node.target in VIEWS and "val" in node.meta:
            _write_known_sizes(node)
        elif node.target is aten.slice_scatter.default and "val" in node.meta:
            _put_between(node)
        elif node.target is aten.scatter.value and "val" in node.args[2].meta:
            _spell_out_number(node)
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


def _put_between(node: Node) -> None:
    whole, piece = node.args[:2]
    made, graph = node.meta["val"], node.graph
    default: tuple[Any, ...] = (0, None, None, 1)
    dim, start, end, step = node.args[2:] + default[len(node.args) - 2 :]
    size = made.shape[dim]
    if step != 1 or not all(place is None or isinstance(place, int) for place in (size, start, end)):
        return
    first, last, _ = slice(start, end).indices(size)

    def kept(begin: int, stop: int) -> list[Any]:
        if begin == stop:
            return []
        part = graph.call_function(aten.slice.Tensor, (whole, dim, begin, stop))
        part.meta["val"] = made.narrow(dim, begin, stop - begin)
        return [part]

    with graph.inserting_before(node):
        pieces = [*kept(0, first), piece, *kept(last, size)]
    node.target, node.args = aten.cat.default, (pieces, dim)


def _spell_out_number(node: Node) -> None:
    whole, dim, index, number = node.args
    sizes, dtype = index.meta["val"].shape, node.meta["val"].dtype  # type: ignore[union-attr]
    if not all(isinstance(size, int) for size in sizes):
        return
    with node.graph.inserting_before(node):
        numbers = node.graph.call_function(aten.full.default, (list(sizes), number), {"dtype": dtype})
        numbers.meta["val"] = node.meta["val"].new_empty(sizes)
    node.target, node.args = aten.scatter.src, (whole, dim, index, numbers)
