"""Arithmetic, comparison and logic: each element from the elements at the same place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import z3

from passes.operations.registry import Model, arguments, models
from passes.terms import (
    FLOATS,
    INTEGERS,
    Index,
    Term,
    Unmodelled,
    boolean,
    dtype_of,
    integer,
    is_tensor,
    leaf_by_leaf,
    literal,
    positive,
    product,
    value_of,
)

if TYPE_CHECKING:
    from passes.symbolic import Evaluator

aten = torch.ops.aten

MODELS: dict[Any, Model] = {}
_models = models(MODELS)


def _is_inexact(argument: Any) -> bool:
    return isinstance(argument, float) or (is_tensor(argument) and dtype_of(argument) in FLOATS)


def _by_numbers(ev: Evaluator, node: Any, index: Index) -> Term:
    """Where every operand is one of a few numbers: PyTorch's own result for each combination of them.

    A zero may have lost its sign here, so no operation that tells -0.0 from 0.0 may use this.
    """
    dtype = dtype_of(node)
    operands = [argument for argument in node.args if is_tensor(argument)]
    if any(not is_tensor(argument) and not isinstance(argument, int | float | None) for argument in node.args):
        raise Unmodelled("a scalar that is only known at run time")

    def calculate(*leaves: Term) -> Term:
        given = iter(leaves)
        arguments = []
        for argument in node.args:
            if is_tensor(argument):  # without dimensions it counts less when types are promoted
                shape = () if argument.meta["val"].dim() == 0 else (1,)
                argument = torch.full(shape, value_of(next(given)), dtype=dtype_of(argument))
            arguments.append(argument)
        result = node.target(*arguments, **node.kwargs)
        if result.dtype != dtype:
            raise Unmodelled(f"a result of {result.dtype} where {dtype} is recorded")
        return literal(result.item(), dtype)

    return leaf_by_leaf(calculate, *(ev.broadcast(operand, node, index) for operand in operands))


def _pointwise(exactly: Model | None) -> Model:
    """``exactly`` for integers and booleans; floating-point numbers one by one."""

    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        if exactly is None or dtype_of(node) in FLOATS or any(map(_is_inexact, node.args)):
            return _by_numbers(ev, node, index)
        return exactly(ev, node, index)

    return model


def _arithmetic(combine: Callable[[Any, Any], Term]) -> Model:
    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        if dtype_of(node) not in INTEGERS:
            raise Unmodelled("arithmetic on booleans")
        left, right = (integer(ev.broadcast(operand, node, index)) for operand in node.args[:2])
        alpha = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
        return combine(left, right if alpha == 1 else right * ev.size(alpha))

    return _pointwise(model)


def _floor(left: z3.ArithRef, right: z3.ArithRef) -> Term:
    return left / positive(right)  # z3 rounds down for a positive divisor


def _truncated(left: z3.ArithRef, right: z3.ArithRef) -> Term:
    divisor = positive(right)
    return z3.If(left >= 0, left / divisor, -((-left) / divisor))


def _divide(ev: Evaluator, node: Any, index: Index) -> Term:
    rounding = {"floor": _floor, "trunc": _truncated}.get(str(node.kwargs.get("rounding_mode")))
    if rounding is None or any(map(_is_inexact, node.args)):
        raise Unmodelled("a division with a fraction")
    return _arithmetic(rounding)(ev, node, index)


def _quotient(ev: Evaluator, node: Any, index: Index) -> Term:
    if not isinstance(node.args[1], int | float) or node.args[1] == 0:
        raise Unmodelled("a divisor that may be zero")  # of which _by_numbers has lost the sign
    return _by_numbers(ev, node, index)


def _comparison(compare: Callable[[Any, Any], Any]) -> Model:
    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        left, right = (integer(ev.broadcast(operand, node, index)) for operand in node.args[:2])
        return compare(left, right)

    return _pointwise(model)


def _logical(combine: Callable[..., Any]) -> Model:
    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        operands = [ev.broadcast(operand, node, index) for operand in node.args[:2]]
        if node.target not in LOGICAL and not all(z3.is_bool(operand) for operand in operands):
            raise Unmodelled("bitwise arithmetic")
        return combine(*(boolean(operand) for operand in operands))

    return _pointwise(model)


LOGICAL = (aten.logical_and.default, aten.logical_or.default, aten.logical_not.default, aten.logical_xor.default)


def _smaller(left: Any, right: Any) -> Term:
    return z3.If(left < right, left, right)


def _larger(left: Any, right: Any) -> Term:
    return z3.If(left > right, left, right)


@_models(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(ev: Evaluator, node: Any, index: Index) -> Term:
    low, high = {
        aten.clamp.default: arguments(node, None, None)[1:],
        aten.clamp_min.default: (node.args[1], None),
        aten.clamp_max.default: (None, node.args[1]),
    }[node.target]
    if dtype_of(node) in FLOATS or node.kwargs:
        return _by_numbers(ev, node, index)
    term = integer(ev.at(node.args[0], index))
    term = term if low is None else _larger(term, ev.size(low))
    return term if high is None else _smaller(term, ev.size(high))


def _negative(ev: Evaluator, node: Any, index: Index) -> Term:
    return -integer(ev.at(node.args[0], index))


def _absolute(ev: Evaluator, node: Any, index: Index) -> Term:
    term = integer(ev.at(node.args[0], index))
    return z3.If(term < 0, -term, term)


def _overloads(name: str, *overloads: str) -> Iterator[Any]:
    for overload in overloads or ("Tensor", "Scalar"):
        if hasattr(packet := getattr(aten, name), overload):
            yield getattr(packet, overload)


for _name, _combine in (
    ("add", operator.add), ("sub", operator.sub), ("rsub", lambda left, right: right - left), ("mul", product),
    ("remainder", lambda left, right: left % positive(right)),
):  # fmt: skip
    MODELS.update(dict.fromkeys(_overloads(_name), _arithmetic(_combine)))
for _name, _combine in (("minimum", _smaller), ("maximum", _larger), ("floor_divide", _floor)):
    MODELS.update(dict.fromkeys(_overloads(_name, "default", "Scalar"), _arithmetic(_combine)))
for _name, _compare in (
    ("le", operator.le), ("lt", operator.lt), ("ge", operator.ge),
    ("gt", operator.gt), ("eq", operator.eq), ("ne", operator.ne),
):  # fmt: skip
    MODELS.update(dict.fromkeys(_overloads(_name), _comparison(_compare)))
for _names, _gate in (
    (("__and__", "bitwise_and", "logical_and"), z3.And),
    (("__or__", "bitwise_or", "logical_or"), z3.Or),
    (("__xor__", "bitwise_xor", "logical_xor"), z3.Xor),
    (("bitwise_not", "logical_not"), z3.Not),
):
    for _name in _names:
        MODELS.update(dict.fromkeys(_overloads(_name, "Tensor", "Scalar", "default"), _logical(_gate)))
MODELS.update(dict.fromkeys(_overloads("div", "Tensor_mode", "Scalar_mode"), _divide))
MODELS.update(dict.fromkeys(_overloads("div"), _quotient))
MODELS.update({aten.neg.default: _pointwise(_negative), aten.abs.default: _pointwise(_absolute)})
MODELS.update(
    dict.fromkeys((aten.exp.default, aten.isinf.default, aten.isnan.default, aten.relu.default), _pointwise(None))
)
