"""Arithmetic, comparison and logic: each element from the elements at the same place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import z3

from passes.operations.making import cast
from passes.operations.registry import Model, arguments, models
from passes.terms import (
    FLOATS,
    INTEGERS,
    Index,
    Term,
    Unmodelled,
    boolean,
    dtype_of,
    in_range,
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


def _quotient(ev: Evaluator, node: Any, index: Index) -> Term:
    if not isinstance(node.args[1], int | float) or node.args[1] == 0:
        raise Unmodelled("a divisor that may be zero")  # of which _by_numbers has lost the sign
    return _by_numbers(ev, node, index)


def _pointwise(exactly: Model | None, floats: Model = _by_numbers) -> Model:
    """``exactly`` for integers and booleans, ``floats`` where there is a floating-point number."""

    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        if exactly is None or dtype_of(node) in FLOATS or any(map(_is_inexact, node.args)):
            return floats(ev, node, index)
        return exactly(ev, node, index)

    return model


def _promoted(ev: Evaluator, node: Any, index: Index) -> list[Term]:
    """The first two operands as integers of the type in which torch calculates with them."""
    operands = node.args[:2]
    # Only types and whether there are dimensions matter to torch; a size is a number here, as any scalar is.
    common = torch.result_type(*(_stand_in(operand) for operand in operands))
    terms = []
    for operand in operands:
        term = ev.broadcast(operand, node, index)
        source = dtype_of(operand) if is_tensor(operand) else torch.bool if z3.is_bool(term) else torch.int64
        terms.append(integer(cast(ev, term, source, common, in_range(ev, node, index))))
    return terms


def _stand_in(operand: Any) -> Any:
    if is_tensor(operand):
        return torch.empty((1,) * min(operand.meta["val"].dim(), 1), dtype=dtype_of(operand))
    return operand if isinstance(operand, bool) else 1


def _arithmetic(combine: Callable[[Any, Any], Term], scaled: int = 1, floats: Model = _by_numbers) -> Model:
    """``combine`` of two integers, of which the one at place ``scaled`` is first multiplied by ``alpha``."""

    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        if dtype_of(node) not in INTEGERS:
            raise Unmodelled("arithmetic on booleans")
        operands = _promoted(ev, node, index)
        alpha = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
        if alpha != 1:
            operands[scaled] = operands[scaled] * ev.size(alpha)
        return combine(*operands)

    return _pointwise(model, floats)


def _reversed_difference(left: z3.ArithRef, right: z3.ArithRef) -> Term:
    return right - left


def _remainder(left: z3.ArithRef, right: z3.ArithRef) -> Term:
    return left % positive(right)


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


def _comparison(compare: Callable[[Any, Any], Any]) -> Model:
    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        return compare(*_promoted(ev, node, index))

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


for _name, _combine in (("add", operator.add), ("sub", operator.sub), ("mul", product)):
    MODELS.update(dict.fromkeys(_overloads(_name), _arithmetic(_combine)))
MODELS.update(dict.fromkeys(_overloads("rsub"), _arithmetic(_reversed_difference, scaled=0)))
MODELS.update(dict.fromkeys(_overloads("remainder"), _arithmetic(_remainder, floats=_quotient)))
MODELS.update(dict.fromkeys(_overloads("floor_divide", "default", "Scalar"), _arithmetic(_floor, floats=_quotient)))
for _name, _combine in (("minimum", _smaller), ("maximum", _larger)):
    MODELS[getattr(aten, _name).default] = _arithmetic(_combine)
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
