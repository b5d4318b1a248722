"""Lets the norm of a head read its product twice.

Qwen3 and Gemma 3 norm each head of query and key before they rotate it.  TensorRT makes two kernels of that, one for
the mean of the squares and one for all that follows, and the first hands over to the second what it has read (read off
the kernels of engines of TensorRT-RTX 1.6, docs/generation.md).

* Of a prompt it hands over numbers cast to fp32, four bytes an element written and read where two would do to read the
  product anew: ``ReshCastMulMean(half*, float*, float*)`` becomes ``ReshCastMulMeanAddSqrt(float*, half*, float*)``.
* Of one token it hands over the values too, which are cut out of the same product, and the cache's update of the values
  is a kernel of its own; where all read the product, keys and values are put into the cache by one.

TensorRT sees that a cast, a reshape or a permutation is done a second time, and makes it one with the first.  It does
not see that the two halves of a head, cut out of the product and put together again, are that head, nor that heads cut
out of the product are those that a piece of the product is made into.  No value changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.graph.writing import is_one, made_in
from passes.proof.op_kinds import RESHAPES

aten = torch.ops.aten
CAST, MEAN, MUL, POW, PERMUTE, SLICE, LINEAR = (
    aten._to_copy.default, aten.mean.dim, aten.mul.Tensor, aten.pow.Tensor_Scalar, aten.permute.default,
    aten.slice.Tensor, aten.linear.default,
)  # fmt: skip


def read_twice(graph: GraphModule) -> int:
    """Give what scales the heads of a product [batch, tokens, heads * size], or of a piece of the product of one token,
    a way of its own from there, in place; returns how many norms there were."""
    scaled = [(cast, scaling) for cast in list(graph.graph.nodes) if (scaling := _scaling(cast)) is not None]
    for cast, scaling in scaled:
        heads, order = _heads(cast)
        with graph.graph.inserting_before(scaling):
            parts = _halves(graph, heads) if heads.args[0].target is not SLICE else [_cut_out(graph, heads)]
            parts = [part if order is None else made_in(graph.graph, PERMUTE, part, order) for part in parts]
            parts = [made_in(graph.graph, CAST, part, dtype=torch.float32) for part in parts]
            whole = parts[0] if len(parts) == 1 else made_in(graph.graph, aten.cat.default, parts, -1)
            scaling.replace_input_with(cast, whole)
    normed = {piece for cast, _ in scaled if (piece := _heads(cast)[0].args[0]).target is SLICE}
    for product in {piece.args[0] for piece in normed}:
        for piece in [user for user in product.users if user.target is SLICE and user not in normed]:
            for heads in [user for user in piece.users if user.target in RESHAPES]:
                with graph.graph.inserting_before(heads):
                    heads.replace_all_uses_with(_cut_out(graph, heads))
                graph.graph.erase_node(heads)
    return len(scaled)


def _scaling(cast: Node) -> Node | None:
    """What multiplies ``cast``, the heads of a product in fp32, with a factor that the mean of their squares makes;
    None if it is no such cast."""
    if cast.target is not CAST or cast.kwargs.get("dtype") != torch.float32 or len(cast.users) != 2:
        return None
    squares = next((user for user in cast.users if _is_square(user, cast)), None)
    scaling = next((user for user in cast.users if user.target is MUL and user is not squares), None)
    if squares is None or scaling is None or [user.target for user in squares.users] != [MEAN]:
        return None
    heads, order = _heads(cast)
    if heads.target not in RESHAPES or heads.meta["val"].dim() != 4 or heads.args[0].meta["val"].dim() != 3:
        return None
    whole = order is None or order[-1] in (3, -1)  # each head stays a row of numbers
    is_narrow = heads.meta["val"].dtype.itemsize < torch.float32.itemsize
    return scaling if whole and is_narrow and _can_be_read_anew(heads) else None


def _can_be_read_anew(heads: Any) -> bool:
    of, (_, tokens, _, size) = heads.args[0], heads.meta["val"].shape
    if not is_one(tokens):
        return of.target is not SLICE and bool(size % 2 == 0)
    if of.target is not SLICE or of.args[0].target is not LINEAR or of.args[1] not in (2, -1):
        return False
    numbers = [of.args[0].meta["val"].shape[-1], *of.args[2:4], size]
    return all(isinstance(each, int) and each % size == 0 for each in numbers)


def _heads(cast: Node) -> tuple[Any, Any]:
    """What ``cast`` is of, before it is permuted, and how it is permuted: None if it is not."""
    of: Any = cast.args[0]
    return (of.args[0], of.args[1]) if of.target is PERMUTE else (of, None)


def _is_square(node: Node, of: Node) -> bool:
    return (node.target, node.args) in ((MUL, (of, of)), (POW, (of, 2)))


def _halves(graph: GraphModule, heads: Any) -> list[Node]:
    """The two halves of each of ``heads`` [batch, tokens, heads, size / 2], cut out of their product."""
    product, (*outer, size) = heads.args
    halved = made_in(graph.graph, heads.target, product, [*outer, 2, size // 2])
    cut = [made_in(graph.graph, SLICE, halved, 3, number, number + 1) for number in (0, 1)]
    return [made_in(graph.graph, heads.target, each, [*outer, size // 2]) for each in cut]


def _cut_out(graph: GraphModule, heads: Any) -> Node:
    """``heads``, which a piece of a product is made into, cut out of the heads of the whole product."""
    piece, size = heads.args[0], heads.meta["val"].shape[-1]
    product, _, start, end = piece.args
    *outer, channels = product.meta["val"].shape
    whole = made_in(graph.graph, heads.target, product, [*outer, channels // size, size])
    return made_in(graph.graph, SLICE, whole, 2, start // size, end // size)
