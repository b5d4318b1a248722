"""Multiplies the two products of a gated feed-forward layer where the second is written.

TensorRT puts products of the same rows together, and multiplies their results in a kernel of its own (``SiluMul``),
which reads and writes three times what the layer lets through.  Over rows of another shape the second is a product by
itself, and multiplies as it writes: ``FcSiluMul`` (read off the kernels of engines of TensorRT-RTX 1.6,
docs/generation.md).  A model that has both as one product (Phi-3, GLM 4) gets two.  No value changes.
"""

from __future__ import annotations

from itertools import permutations
from operator import getitem
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.graph.weights import put, value_of
from passes.graph.writing import is_one, made_in
from passes.proof.op_kinds import RESHAPES
from passes.tensorrt import few_bits

aten = torch.ops.aten
MUL, LINEAR, RESHAPE, SPLIT = aten.mul.Tensor, aten.linear.default, aten.reshape.default, aten.split.Tensor


def multiply_gates(graph: GraphModule) -> int:
    """Have the second product of a gated layer, ``act(x @ gate) * (x @ up)``, run over ``x`` [batch, tokens, in] as
    [batch * tokens, in], in place; returns how many there were."""
    for node in list(graph.graph.nodes):
        _take_apart(graph, node)
    gated = [up for node in list(graph.graph.nodes) if (up := _gated(node)) is not None]
    for up in gated:
        batch, _, outputs = up.meta["val"].shape
        rows, *weights = up.args
        with graph.graph.inserting_before(up):
            flat = made_in(graph.graph, RESHAPE, rows, [-1, rows.meta["val"].shape[-1]])
            product = made_in(graph.graph, LINEAR, flat, *weights)
            up.replace_all_uses_with(made_in(graph.graph, RESHAPE, product, [batch, -1, outputs]))
        graph.graph.erase_node(up)
    return len(gated)


def _take_apart(graph: GraphModule, split: Node) -> None:
    """Make two products of one whose outputs are ``split`` into two equal parts, one to gate the other."""
    product: Any = split.args[0] if split.target is SPLIT else None
    if product is None or product.target is not LINEAR or len(product.users) != 1 or not _is_of_many_rows(product):
        return
    weights: Any = [value_of(graph, each) for each in product.args[1:]]
    parts: dict[Any, Node] = {part.args[1]: part for part in split.users if part.target is getitem}
    if any(each is None for each in weights) or sorted(parts) != [0, 1] or len(split.users) != 2:
        return
    half, is_odd = divmod(weights[0].shape[0], 2)
    if is_odd or any(part.meta["val"].shape[-1] != half for part in parts.values()):
        return
    if not any(_activates(user, gate, up) for gate, up in permutations(parts.values()) for user in up.users):
        return
    for number, part in parts.items():
        with graph.graph.inserting_before(product):
            own = [put(graph, f"{product.name}_{number}", each.detach()[number * half :][:half]) for each in weights]
            part.replace_all_uses_with(made_in(graph.graph, LINEAR, product.args[0], *own))
    for each in (*parts.values(), split, product):
        graph.graph.erase_node(each)


def _activates(node: Node, gate: Node, up: Node) -> bool:
    """Whether ``node`` multiplies ``up`` with what was made of ``gate``."""
    others = [arg for arg in node.args if arg is not up]
    return node.target is MUL and len(others) == 1 and isinstance(others[0], Node) and _made_by(others[0], gate)


def _is_of_many_rows(product: Node) -> bool:
    """Whether it is one of [batch, tokens, in] in which TensorRT may put what is behind it."""
    if _rank(product) != 3 or few_bits.reads_few_bits(product):
        return False
    batch, tokens, _ = product.meta["val"].shape
    return isinstance(batch, int) and not is_one(tokens)


def _gated(node: Node) -> Any:
    """The product that ``node`` multiplies with what an activation made of another product of the same rows, if it does
    that, to many rows."""
    ups: list[Any] = [arg for arg in node.all_input_nodes if arg.target is LINEAR] if node.target is MUL else []
    for up in ups:
        if len(up.users) == 1 and _is_of_many_rows(up):
            gates = [user for user in up.args[0].users if user is not up and user.target is LINEAR]
            if any(_activates(node, gate, up) for gate in gates):
                return up
    return None


def _made_by(node: Node, gate: Node) -> bool:
    """Whether ``node`` is what element by element operations made of ``gate`` alone."""
    seen, left = {gate}, [node]
    while left:
        each = left.pop()
        if each in seen:
            continue
        if "val" not in each.meta or _rank(each) != 3 or each.target in (LINEAR, *RESHAPES) or not each.all_input_nodes:
            return False
        seen.add(each)
        left += each.all_input_nodes
    return node is not gate


def _rank(node: Any) -> int:
    return node.meta["val"].dim() if isinstance(node, Node) and "val" in node.meta else -1
