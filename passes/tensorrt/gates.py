"""Brings what the many rows of a prompt go through into the form of which TensorRT makes fewer and better kernels.

Read off the kernels of engines of TensorRT-RTX 1.6, which hold their source (docs/generation.md); no value changes:

* The norm of a head (Qwen3 and Gemma 3 norm those of query and key before they rotate them) becomes two kernels, one
  for the mean of the squares and one for all that follows, and the first hands over what it has read, cast to fp32:
  four bytes an element written and read again where two would do to read the product anew.  TensorRT sees through a
  cast, a reshape or a permutation that is done a second time and makes it one with the first.  It does not see through
  two halves that are cut out of the product and put together again, and they cost nothing: the rotation reads halves.
  ``ReshCastMulMean(half*, float*, float*)`` becomes ``ReshCastMulMeanAddSqrt(float*, half*, float*)``.
* The two products of a gated feed-forward layer, of the same rows, are put together, and their results multiplied in a
  kernel of its own (``SiluMul``), which reads and writes three times what the layer lets through.  Over rows of another
  shape the second is a product by itself, and multiplies as it writes: ``FcSiluMul``.  A model that has both as one
  product (Phi-3, GLM 4) gets two.
"""

from __future__ import annotations

from itertools import permutations
from operator import getitem
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from passes.graph.weights import put, value_of
from passes.proof.op_kinds import RESHAPES
from passes.tensorrt import few_bits

aten = torch.ops.aten
CAST, MEAN, MUL, POW, PERMUTE, LINEAR, RESHAPE, SPLIT = (
    aten._to_copy.default, aten.mean.dim, aten.mul.Tensor, aten.pow.Tensor_Scalar, aten.permute.default,
    aten.linear.default, aten.reshape.default, aten.split.Tensor,
)  # fmt: skip


def read_heads_twice(graph: GraphModule) -> int:
    """Give what scales the heads of a product [batch, tokens, heads * size] a cast of its own, made of their two
    halves, in place; returns how many norms there were."""
    scaled = [(cast, scaling) for cast in list(graph.graph.nodes) if (scaling := _scaling(cast)) is not None]
    for cast, scaling in scaled:
        with graph.graph.inserting_before(scaling):
            scaling.replace_input_with(cast, _in_halves(graph, cast))
    return len(scaled)


def _scaling(cast: Node) -> Node | None:
    """What multiplies ``cast``, the heads of a product in fp32, with a factor that the mean of their squares makes;
    None if it is no such cast, or of a single token, which is read in one go."""
    if cast.target is not CAST or cast.kwargs.get("dtype") != torch.float32 or len(cast.users) != 2:
        return None
    squares = next((user for user in cast.users if _is_square(user, cast)), None)
    scaling = next((user for user in cast.users if user.target is MUL and user is not squares), None)
    if squares is None or scaling is None or [user.target for user in squares.users] != [MEAN]:
        return None
    heads, order = _heads(cast)
    if heads.target not in RESHAPES or [_rank(heads), _rank(heads.args[0])] != [4, 3]:
        return None
    _, tokens, _, size = heads.meta["val"].shape
    whole = order is None or order[-1] in (3, -1)  # each head stays a row of numbers
    is_narrow = heads.meta["val"].dtype.itemsize < torch.float32.itemsize
    return scaling if whole and is_narrow and size % 2 == 0 and not _is_one(tokens) else None


def _heads(cast: Node) -> tuple[Any, Any]:
    """What ``cast`` is of, before it is permuted, and how it is permuted: None if it is not."""
    of: Any = cast.args[0]
    return (of.args[0], of.args[1]) if of.target is PERMUTE else (of, None)


def _is_square(node: Node, of: Node) -> bool:
    return (node.target, node.args) in ((MUL, (of, of)), (POW, (of, 2)))


def _in_halves(graph: GraphModule, cast: Node) -> Node:
    """``cast``, made of the two halves of each head in the product."""
    heads, order = _heads(cast)
    product, shape = heads.args
    *outer, size = shape
    halved = _call(graph, heads.target, product, [*outer, 2, size // 2])
    halves = []
    for number in (0, 1):
        half = _call(graph, aten.slice.Tensor, halved, 3, number, number + 1)
        half = _call(graph, heads.target, half, [*outer, size // 2])
        half = half if order is None else _call(graph, PERMUTE, half, order)
        halves.append(_call(graph, CAST, half, dtype=torch.float32))
    return _call(graph, aten.cat.default, halves, -1)


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
            flat = _call(graph, RESHAPE, rows, [-1, rows.meta["val"].shape[-1]])
            product = _call(graph, LINEAR, flat, *weights)
            up.replace_all_uses_with(_call(graph, RESHAPE, product, [batch, -1, outputs]))
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
    if not any(_activates(user, gate, up) for gate, up in permutations(parts.values()) for user in up.users):
        return
    half = weights[0].shape[0] // 2
    for number, part in parts.items():
        with graph.graph.inserting_before(product):
            own = [put(graph, f"{product.name}_{number}", each.detach()[number * half :][:half]) for each in weights]
            part.replace_all_uses_with(_call(graph, LINEAR, product.args[0], *own))
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
    return isinstance(batch, int) and not _is_one(tokens)


def _gated(node: Node) -> Any:
    """The product that ``node`` multiplies with what an activation made of another product of the same rows, if it does
    that, to many rows."""
    args: Any = node.args
    if node.target is not MUL or not all(isinstance(arg, Node) for arg in args):
        return None
    for activated, up in (args, args[::-1]):
        if up.target is LINEAR and len(up.users) == 1 and _is_of_many_rows(up):
            gates = [user for user in up.args[0].users if user is not up and user.target is LINEAR]
            if any(_made_by(activated, gate) for gate in gates):
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


def _call(graph: GraphModule, target: Any, *args: Any, **kwargs: Any) -> Node:
    node = graph.graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*map_arg(args, lambda each: each.meta["val"]), **kwargs)
    return node


def _rank(node: Any) -> int:
    return node.meta["val"].dim() if isinstance(node, Node) and "val" in node.meta else -1


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
