"""Hands the weights of a prompt's products over as [in, out], with what is summed over as their first axis.

As a linear layer has them, [out, in], TensorRT-RTX 1.6 reads them transposed in every pass: 2048 rows times 2048 x
8192 take 112 us on an H100 as a network of one length and 145 us in a range of lengths, and 108 and 139 us the other
way round (seen once, one product alone; ``python -m benchmarks.products`` measures whole MLPs).
"""

from __future__ import annotations

from math import prod

import torch
from torch.fx import GraphModule, Node

from passes.graph.weights import put, value_of

aten = torch.ops.aten

FEW = 64
"""Rows below which a product is bound by reading its weights once, and their order is left as it is."""


def transpose_weights(graph: GraphModule) -> int:
    """Turn the constant weights of products of many rows, in place; returns of how many."""
    turned = 0
    for node in list(graph.graph.nodes):
        if node.target is not aten.linear.default or not _has_many_rows(node):
            continue
        row, weight, *bias = node.args
        value = value_of(graph, weight)
        if value is None or value.dim() != 2:
            continue
        with torch.no_grad(), graph.graph.inserting_before(node):
            columns = put(graph, f"{node.name}_weights", value.t().contiguous())
            made = graph.graph.call_function(aten.matmul.default, (row, columns))
            made.meta |= node.meta
            if bias and bias[0] is not None:
                made = graph.graph.call_function(aten.add.Tensor, (made, bias[0]))
                made.meta |= node.meta
        node.replace_all_uses_with(made)
        graph.graph.erase_node(node)
        turned += 1
    graph.graph.eliminate_dead_code()
    return turned


def _has_many_rows(node: Node) -> bool:
    """Whether ``node`` multiplies a number of rows that is open, or is at least :data:`FEW`."""
    sizes = node.args[0].meta["val"].shape[:-1]  # type: ignore[union-attr]
    return any(not isinstance(size, int) for size in sizes) or prod(sizes) >= FEW
