"""Folds the softmax scale of an attention call into the weights that make its query.

TensorRT-RTX 1.4 on compute capability 9.0 loses a single factor that is multiplied onto Q or K right before a
causal native layer, as if the scale were 1: relative error 0.2 at length 2 and 0.66 from length 500 on, at head
sizes 64 and 128, with and without a rotary embedding before it, whether the factor is a constant, two constants,
a division, or derived from a shape (``tests/test_scale_gpu.py``).  A factor for each channel is right, a sum of two
halves is, and so is a scale that is not in the network at all: that one goes into the weights and is free.

Legal because attention scores are linear in Q, and every operation between those weights and Q is homogeneous of
degree one in the part that is scaled: f(s x) = s f(x).  Multiplying weights by s rounds each of them once; it is
exact where s is a power of two (head size 64: 1/8), up to fp16's subnormals.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from passes.quantised import DEQUANTISED

aten = torch.ops.aten

# f(s x) = s f(x) in their first argument.
HOMOGENEOUS = frozenset(
    [
        aten.alias.default, aten.clone.default, aten.detach.default, aten.neg.default, aten.permute.default,
        aten.reshape.default, aten.select.int, aten.slice.Tensor, aten.squeeze.dim, aten.squeeze.dims,
        aten.transpose.int, aten._unsafe_view.default, aten.unsqueeze.default, aten.view.default, aten._to_copy.default,
    ]
)  # fmt: skip


class _CannotFold(Exception):
    """The scale cannot be carried further up; the message says at which node."""


def fold_scale(program: ExportedProgram, attention: Node, query: Node, scale: float) -> str | None:
    """Multiply ``scale`` into the weights behind ``query``, in place in ``program.state_dict``.

    Returns None when done, or the reason why it cannot be: then nothing was changed.
    """
    weights: set[str] = set()
    cone: set[Node] = set()
    parameters = program.graph_signature.inputs_to_parameters | _scales(program)
    try:
        _climb(query, cone, weights, parameters)
        cone.add(attention)
        for node in cone - {attention}:
            if any(user not in cone for user in node.users):
                raise _CannotFold(f"{node.name} is used elsewhere too")
        for name in weights:
            placeholder = next(node for node in program.graph.nodes if node.name == name)
            if any(user not in cone for user in placeholder.users):
                raise _CannotFold(f"the weight {name} is used elsewhere too")
        for node in cone:
            _check_scaled_once(node, cone, weights)
    except _CannotFold as obstacle:
        return str(obstacle)
    for name in weights:
        key = parameters[name]
        weight = program.state_dict[key]
        # A new tensor under the same key: the module that was traced keeps its own.
        scaled = (weight.detach().double() * scale).to(weight.dtype)
        is_parameter = isinstance(weight, torch.nn.Parameter)
        program.state_dict[key] = torch.nn.Parameter(scaled, requires_grad=False) if is_parameter else scaled
    return None


def _scales(program: ExportedProgram) -> dict[str, str]:
    """Placeholder -> its place in ``program.state_dict``, of the scales of quantised weights."""
    read = {node.args[1] for node in program.graph.find_nodes(op="call_function", target=DEQUANTISED)}
    buffers = program.graph_signature.inputs_to_buffers
    return {node.name: buffers[node.name] for node in read if isinstance(node, Node) and node.name in buffers}


def _climb(node: Any, cone: set[Node], weights: set[str], parameters: Any) -> None:
    """Walk up from Q to the weights, collecting the nodes whose value is scaled with them."""
    if not isinstance(node, Node) or node.op != "call_function":
        raise _CannotFold(f"{node} is not computed from weights")
    if node in cone:
        return
    trial, found = {*cone, node}, set(weights)
    target = node.target
    if target is aten.linear.default:
        _take(node.args[1:], trial, found, parameters)
    elif target in HOMOGENEOUS:
        if not node.meta["val"].dtype.is_floating_point:
            raise _CannotFold(f"{node.name} leaves floating point")
        _climb(node.args[0], trial, found, parameters)
    elif target is aten.cat.default:
        for part in node.args[0]:  # type: ignore[union-attr]
            _climb(part, trial, found, parameters)
    elif target in (aten.add.Tensor, aten.sub.Tensor):
        for part in node.args[:2]:
            _climb(part, trial, found, parameters)
    elif target is aten.mul.Tensor:
        _climb_product(node, trial, found, parameters)
    else:
        raise _CannotFold(f"{node.name} ({target}) is not homogeneous")
    cone |= trial
    weights |= found


def _climb_product(node: Node, cone: set[Node], weights: set[str], parameters: Any) -> None:
    """A product is scaled through one factor: a weight beside it (a norm's), or whichever factor leads to one."""
    for factor in node.args[:2]:
        if isinstance(factor, Node) and factor.name in parameters:
            weights.add(factor.name)
            return
    obstacle = _CannotFold(node.name)
    for factor in node.args[:2]:
        trial, found = set(cone), set(weights)
        try:
            _climb(factor, trial, found, parameters)
        except _CannotFold as error:
            obstacle = error
            continue
        cone |= trial
        weights |= found
        return
    raise obstacle


def _check_scaled_once(node: Node, cone: set[Node], weights: set[str]) -> None:
    """Refuse a product of two scaled factors, which would be scaled by s * s."""
    if node.target in (aten.add.Tensor, aten.sub.Tensor, aten.cat.default):
        return  # linear in all that they take together
    is_linear = node.target is aten.linear.default  # its weight and bias are scaled, so its input must not be
    factors = node.args[:1] if is_linear else (*node.args, *node.kwargs.values())
    scaled = sum(isinstance(factor, Node) and (factor in cone or factor.name in weights) for factor in factors)
    if scaled > (0 if is_linear else 1):
        raise _CannotFold(f"{node.name} multiplies what is scaled by what is scaled")


def _take(operands: Any, cone: set[Node], weights: set[str], parameters: Any) -> None:
    for operand in operands:
        if operand is None:
            continue
        if isinstance(operand, Node) and operand.target is DEQUANTISED:  # values times scales
            cone.add(operand)
            operand = operand.args[1]
        if not isinstance(operand, Node) or operand.name not in parameters:
            raise _CannotFold(f"{operand} is not a weight")
        weights.add(operand.name)
