"""Complex numbers written out as two real ones, for TensorRT has none: Llama 4 and DeepSeek V2 turn positions by them.

Legal because each operation is the definition of its own: ``polar(r, t)`` is ``r cos t + i r sin t``, a product is
``(a + ib)(c + id) = (ac - bd) + i(ad + bc)``, and what moves elements moves both parts alike.  PyTorch computes the
same sums of products in the same precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from passes.graph.writing import made_in
from passes.proof.op_kinds import VIEW_LIKE

aten = torch.ops.aten
MOVES = {
    *VIEW_LIKE, aten.alias.default, aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten.index_select.default,
    aten.transpose.int, aten.permute.default, aten.squeeze.dim, aten.squeeze.default, aten.flatten.using_ints,
    aten.embedding.default,
}  # fmt: skip
"""Operations that a complex tensor is the first argument of, and that do to its parts what they do to it."""
SUMS = {aten.add.Tensor, aten.sub.Tensor}
MADE = {aten.polar.default, aten.complex.default, aten.view_as_complex.default}
READ = {aten.view_as_real.default, aten.real.default, aten.imag.default}
PRODUCT = aten.mul.Tensor

Pair = tuple[Node, Node]


def is_complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, Tensor) and value.is_complex()


def write_out(graph_module: GraphModule) -> int:
    """Write the complex numbers of ``graph_module`` as real ones, in place; returns how many operations were.

    A graph with an operation on them that is not known here stays as it is, and is refused where it is converted.
    """
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        if is_complex(node.args[0]):
            graph.erase_node(node)  # of what the graph itself makes
    concerned = [node for node in graph.nodes if is_complex(node) or any(map(is_complex, node.all_input_nodes))]
    if not all(_known(node) for node in concerned):
        return 0
    parts: dict[Node, Pair] = {}
    for node in concerned:
        with graph.inserting_before(node):
            made = _written(node, parts)
        if isinstance(made, tuple):
            parts[node] = made
        else:
            made.meta = {**node.meta, "val": made.meta["val"]}
            node.replace_all_uses_with(made)
    for node in reversed(concerned):
        graph.erase_node(node)
    return len(concerned)


def _known(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in READ or node.target in MADE:
        return True
    numbers = [each for each in node.args[:2] if is_complex(each)]
    if node.target in (PRODUCT, *SUMS):
        return node.target is PRODUCT or len(numbers) == 2
    return node.target in MOVES and is_complex(node.args[0]) and len(numbers) == 1


def _written(node: Node, parts: dict[Node, Pair]) -> Pair | Node:
    """The parts of complex ``node``, or the real tensor in its place."""
    graph = node.graph

    def op(target: Any, *args: Any) -> Node:
        return made_in(graph, target, *args)

    first, *rest = node.args
    if node.target is aten.polar.default:
        size, angle = first, rest[0]
        return op(PRODUCT, size, op(aten.cos.default, angle)), op(PRODUCT, size, op(aten.sin.default, angle))
    if node.target is aten.complex.default:
        return first, rest[0]  # type: ignore[return-value]
    if node.target is aten.view_as_complex.default:
        return op(aten.select.int, first, -1, 0), op(aten.select.int, first, -1, 1)
    if node.target is aten.view_as_real.default:
        return op(aten.cat.default, [op(aten.unsqueeze.default, part, -1) for part in parts[first]], -1)  # type: ignore[index]
    if node.target in (aten.real.default, aten.imag.default):
        return op(aten.alias.default, parts[first][node.target is aten.imag.default])  # type: ignore[index]
    if node.target is PRODUCT:
        return _product(op, *(parts.get(each, each) for each in node.args[:2]))  # type: ignore[arg-type]
    if node.target in SUMS:
        return tuple(op(node.target, a, b) for a, b in zip(*(parts[each] for each in node.args[:2]), strict=True))  # type: ignore
    pairs = [map_arg(node.args, lambda each: parts[each][i] if each in parts else each) for i in (0, 1)]  # noqa: B023
    return tuple(made_in(graph, node.target, *args, **node.kwargs) for args in pairs)  # type: ignore[return-value]


def _product(op: Any, left: Any, right: Any) -> Pair:
    if not isinstance(left, tuple):
        left, right = right, left
    if not isinstance(right, tuple):  # a real number
        return op(PRODUCT, left[0], right), op(PRODUCT, left[1], right)
    (a, b), (c, d) = left, right
    real = op(aten.sub.Tensor, op(PRODUCT, a, c), op(PRODUCT, b, d))
    return real, op(aten.add.Tensor, op(PRODUCT, a, d), op(PRODUCT, b, c))
