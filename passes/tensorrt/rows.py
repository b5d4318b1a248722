"""Builds the products of one row with weights: what a decode step of a batch of one consists of.

Measured on an H100 with TensorRT-RTX 1.6, fp16 (``python -m benchmarks.kernels step linear``; docs/generation.md):

* A product element by element and its sums becomes one kernel, together with what made the row: a layer of Llama 3.2 1B
  takes 71 us, with matrix products of one row 84, of eight rows 96.  Products that share a row must be put together for
  that: apart, the fused kernel makes the row anew for each, and is slower than the matrix products (76 us).
* The gain of the norm is read there for every output: as part of the weights it costs nothing, which saves 1.2 us a
  layer, and is rounded no more often than before.
* Query and key, pieces of one product, are normed and rotated together (:mod:`passes.graph.query_key_joining`).
* The product with the vocabulary is such a product too: 168 us, as a matrix product 187, of eight rows 196.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.tools_common import stable_topological_sort

from passes.graph import query_key_joining
from passes.graph.weights import put, value_of
from passes.tensorrt import few_bits
from passes.tensorrt.attention import as_tensor, reshaped
from passes.tensorrt.one_row import times_row
from passes.tensorrt.versions import Stack

aten = torch.ops.aten
LINEAR = aten.linear.default

VOCABULARY = 65536
"""Outputs from which a norm's gain stays where it is: such a weight is often tied to the table of the tokens, and would
be in the engine twice."""


def applies(node: Node) -> bool:
    """Whether ``node`` is the only product of its row, and that row is the only one."""
    row = _row(node)
    return row is not None and len(row.users) == 1 and not few_bits.reads_few_bits(node)


def _row(node: Node) -> Node | None:
    """The one row [1 ..., in] that ``node`` multiplies with a weight, if it does that."""
    row: Any = node.args[0] if node.target is LINEAR else None
    if row is None or "val" not in row.meta:
        return None
    sizes = row.meta["val"].shape[:-1]
    return row if all(isinstance(size, int) for size in sizes) and prod(sizes) == 1 else None


def write_squares(graph: GraphModule) -> int:
    """Write squares as products, in place; returns how many.  A power keeps a norm out of the kernel of the product
    behind it."""
    changed = 0
    for node in graph.graph.nodes:
        if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2 and _keeps_type(node):
            node.target, node.args = aten.mul.Tensor, (node.args[0], node.args[0])
            changed += 1
    return changed


def fuse(graph: GraphModule) -> int:
    """Bring ``graph`` into the form in which TensorRT fuses what becomes of a row, in place; returns how many rows are
    multiplied with weights that were put together."""
    merged = 0
    for row in list(graph.graph.nodes):
        products = list(row.users)
        if products and all(_row(product) is row for product in products):
            if all(_constants(graph, product) for product in products):
                merged += _merge(graph, row, products)
            elif len(products) > 1 and (whole := few_bits.together(graph, products)) is not None:
                _put_together(graph, row, products, whole)
                merged += 1
    stable_topological_sort(graph)  # a merged product stands where one of them stood, and not always the first
    return merged


def join(graph: GraphModule) -> int:
    """Compute once what is done alike to the queries and the keys of a row, in place; returns how many pairs."""
    return query_key_joining.join(graph, [node for node in graph.graph.nodes if _row(node) is not None])


def _keeps_type(node: Node) -> bool:
    """Whether ``node`` is of the type of what it reads: the power 2.0 of a whole number is not."""
    return bool(node.meta["val"].dtype == node.args[0].meta["val"].dtype)  # type: ignore[union-attr]


def _constants(graph: GraphModule, product: Node) -> list[Tensor | None]:
    """Weight [out, in] and bias [out] of ``product``; none at all where one of them is computed."""
    args = (*product.args[1:], None)[:2]
    found = [value_of(graph, arg) for arg in args]
    computed = any(arg is not None and value is None for arg, value in zip(args, found, strict=True))
    shaped = [None if value is None else value.dim() for value in found] in ([2, None], [2, 1])
    return found if shaped and not computed else []


def _merge(graph: GraphModule, row: Node, products: list[Node]) -> bool:
    """Put the weights [out, in] of all ``products``, which alone read ``row``, together, with the gain of its norm."""
    weights = [weight for product in products if (weight := _constants(graph, product)[0]) is not None]
    gain, normed = _gain(graph, row) if sum(map(len, weights)) < VOCABULARY else (None, row)
    if gain is None and len(products) == 1:
        return False
    with torch.no_grad(), graph.graph.inserting_before(products[0]):
        whole = torch.cat(weights)
        if gain is not None:
            wide = torch.promote_types(whole.dtype, torch.float32)
            whole = (whole.to(wide) * gain.to(wide)).to(whole.dtype)
        _put_together(graph, normed, products, put(graph, f"{products[0].name}_weights", whole))
    if gain is not None:
        graph.graph.erase_node(row)
    return True


def _put_together(graph: GraphModule, row: Node, products: list[Node], weight: Node) -> None:
    """Have one product of ``row`` with ``weight``, in which theirs stand one after another, and its pieces in the place
    of ``products``."""
    biases = [value_of(graph, product.args[2]) if len(product.args) > 2 else None for product in products]
    sizes = [product.meta["val"].shape[-1] for product in products]
    first = products[0].meta["val"]
    with torch.no_grad(), graph.graph.inserting_before(products[0]):
        args = [row, weight]
        if given := [bias for bias in biases if bias is not None]:
            pairs = zip(biases, sizes, strict=True)
            together = torch.cat([given[0].new_zeros(size) if bias is None else bias for bias, size in pairs])
            args.append(put(graph, f"{products[0].name}_biases", together))
        merged = graph.graph.call_function(LINEAR, tuple(args))
        merged.meta["val"] = first.new_empty((*first.shape[:-1], sum(sizes)))
        for i, product in enumerate(products):
            piece = merged
            if len(products) > 1:
                part = (merged, -1, sum(sizes[:i]), sum(sizes[: i + 1]))
                piece = graph.graph.call_function(torch.ops.aten.slice.Tensor, part)
                piece.meta["val"] = product.meta["val"]
            product.replace_all_uses_with(piece)
    for product in products:
        graph.graph.erase_node(product)


def _gain(graph: GraphModule, row: Node) -> tuple[Tensor | None, Node]:
    """The gain [in] by which ``row`` is another row, and that row; no gain, and ``row``, if it is not made so."""
    like = row.meta["val"]
    for one, other in (row.args, row.args[::-1]) if row.target is aten.mul.Tensor else ():
        gain = value_of(graph, one)
        if gain is None or gain.shape != like.shape[-1:] or not isinstance(other, Node) or other.op == "get_attr":
            continue
        if other.meta["val"].shape == like.shape and other.meta["val"].dtype == like.dtype:
            return gain, other
    return None, row


def convert(stack: Stack, ctx: Any, node: Node, args: tuple[Any, ...]) -> Any:
    """The output [..., out] of ``node``: row [..., in], weight [out, in], and maybe a bias [out]."""
    net, trt = ctx.net, stack.trt
    row, weight, *bias = args
    out, inner = node.args[1].meta["val"].shape  # type: ignore[union-attr]
    row, weight = reshaped(net, row, (1, inner)), as_tensor(ctx, weight, f"{node.name} [weight]")
    result = times_row(stack, net, weight, row)
    if bias and bias[0] is not None:
        bias_tensor = as_tensor(ctx, bias[0], f"{node.name} [bias]")
        result = net.add_elementwise(result, bias_tensor, trt.ElementWiseOperation.SUM).get_output(0)
    return reshaped(net, result, (*node.meta["val"].shape[:-1], out))
