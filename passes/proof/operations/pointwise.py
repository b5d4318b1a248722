"""Arithmetic, comparison and logic: each element from the elements at the same place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import z3

from passes.proof.operations.making import cast, choice, scalar_as
from passes.proof.operations.registry import Model, arguments
from passes.proof.terms import (
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
    from passes.proof.symbolic import Evaluator

aten = torch.ops.aten

MODELS: dict[Any, Model] = {}


def _is_inexact(argument: Any) -> bool:
    return isinstance(argument, float) or (is_tensor(argument) and dtype_of(argument) in FLOATS)


def _inputs(node: Any) -> list[Any]:
    return [*node.args, *node.kwargs.values()]


def _by_numbers(ev: Evaluator, node: Any, index: Index) -> Term:
    """Where every operand is one of a few numbers: PyTorch's own result for each combination of them.

    A zero may have lost its sign here, so no operation that tells -0.0 from 0.0 may use this.
    """
    dtype = dtype_of(node)
    operands = [argument for argument in _inputs(node) if is_tensor(argument)]
    if any(not is_tensor(argument) and not isinstance(argument, int | float | None) for argument in _inputs(node)):
        raise Unmodelled("a scalar that is only known at run time")

    def calculate(*leaves: Term) -> Term:
        given = iter(leaves)

        def stand_in(argument: Any) -> Any:
            if not is_tensor(argument):
                return argument
            # Without dimensions it counts less when types are promoted; a single element would count as such a one.
            shape = () if argument.meta["val"].dim() == 0 else (2,)
            return torch.full(shape, value_of(next(given)), dtype=dtype_of(argument))

        args = [stand_in(argument) for argument in node.args]
        kwargs = {name: stand_in(argument) for name, argument in node.kwargs.items()}
        try:
            result = node.target(*args, **kwargs)
        except RuntimeError as error:  # types that it does not take, scalars that do not fit
            raise Unmodelled(f"refused by torch: {error}") from error
        if result.dtype != dtype:
            raise Unmodelled(f"a result of {result.dtype} where {dtype} is recorded")
        return literal(result.flatten()[0].item(), dtype)

    return leaf_by_leaf(calculate, *(ev.broadcast(operand, node, index) for operand in operands))


def _quotient(ev: Evaluator, node: Any, index: Index) -> Term:
    _dividend, divisor = arguments(node, "self", "other")
    if not isinstance(divisor, int | float) or divisor == 0:
        raise Unmodelled("a divisor that may be zero")  # of which _by_numbers has lost the sign
    return _by_numbers(ev, node, index)


def _pointwise(exactly: Model | None, floats: Model = _by_numbers) -> Model:
    """``exactly`` for integers and booleans, ``floats`` where there is a floating-point number."""

    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        if exactly is None or dtype_of(node) in FLOATS or any(map(_is_inexact, _inputs(node))):
            return floats(ev, node, index)
        return exactly(ev, node, index)

    return model


def _promoted(ev: Evaluator, node: Any, index: Index, *operands: Any) -> list[Term]:
    """The two ``operands`` as integers of the type in which torch calculates with them."""
    # Only types and whether there are dimensions matter to torch; a size is a number here, as any scalar is.
    common = torch.result_type(*(_stand_in(operand) for operand in operands))
    terms = []
    for operand in operands:
        if not is_tensor(operand):
            terms.append(integer(scalar_as(ev, operand, common)))
            continue
        term = ev.broadcast(operand, node, index)
        terms.append(integer(cast(ev, term, dtype_of(operand), common, in_range(ev, node, index))))
    return terms


def _stand_in(operand: Any) -> Any:
    if is_tensor(operand):
        return torch.empty((1,) * min(operand.meta["val"].dim(), 1), dtype=dtype_of(operand))
    return operand if isinstance(operand, bool) else 1


def _arithmetic(combine: Callable[[Any, Any], Term], floats: Model = _by_numbers) -> Model:
    """``combine`` of two integers."""

    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        if dtype_of(node) not in INTEGERS:
            raise Unmodelled("arithmetic on booleans")
        return combine(*_promoted(ev, node, index, *arguments(node, "self", "other")))

    return _pointwise(model, floats)


def _scaled(combine: Callable[[Any, Any], Term], scaled: int) -> Model:
    """``combine`` of two integers, of which the one at place ``scaled`` is first multiplied by ``alpha``."""

    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        if dtype_of(node) not in INTEGERS:
            raise Unmodelled("arithmetic on booleans")
        *operands, alpha = arguments(node, "self", "other", "alpha")
        terms = _promoted(ev, node, index, *operands)
        if alpha != 1:
            terms[scaled] = product(terms[scaled], integer(scalar_as(ev, alpha, dtype_of(node))))
        return combine(*terms)

    return _pointwise(model)


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
    left, right, mode = arguments(node, "self", "other", "rounding_mode")
    rounding = {"floor": _floor, "trunc": _truncated}.get(str(mode))
    if rounding is None or dtype_of(node) not in INTEGERS:
        raise Unmodelled("a division with a fraction")
    return rounding(*_promoted(ev, node, index, left, right))


def _comparison(compare: Callable[[Any, Any], Any]) -> Model:
    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        return compare(*_promoted(ev, node, index, *arguments(node, "self", "other")))

    return _pointwise(model)


def _logical(combine: Callable[..., Any]) -> Model:
    """``combine`` of two truths."""

    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        return combine(*(boolean(ev.broadcast(operand, node, index)) for operand in arguments(node, "self", "other")))

    return _pointwise(model)


def _bitwise(combine: Callable[..., Any]) -> Model:
    """``combine`` of two booleans; bits of integers are not modelled."""

    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        if dtype_of(node) != torch.bool:
            raise Unmodelled("bitwise arithmetic")
        return combine(*(choice(ev, operand, node, index) for operand in arguments(node, "self", "other")))

    return model


def _not(ev: Evaluator, node: Any, index: Index) -> Term:
    (source,) = arguments(node, "self")
    if node.target is aten.bitwise_not.default and dtype_of(node) != torch.bool:
        raise Unmodelled("bitwise arithmetic")
    return z3.Not(boolean(ev.at(source, index)))


def _smaller(left: Any, right: Any) -> Term:
    return z3.If(left < right, left, right)


def _larger(left: Any, right: Any) -> Term:
    return z3.If(left > right, left, right)


def _clamp(low: str | None, high: str | None) -> Model:
    """Between the arguments that are called ``low`` and ``high``, of which the second wins."""

    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        names = [name for name in (low, high) if name]
        source, *bounds = arguments(node, "self", *names)
        inside = in_range(ev, node, index)
        term = integer(cast(ev, ev.at(source, index), dtype_of(source), dtype_of(node), inside))
        for name, bound in zip(names, bounds, strict=True):
            if bound is not None:
                bound = integer(scalar_as(ev, bound, dtype_of(node)))
                term = _larger(term, bound) if name == low else _smaller(term, bound)
        return term

    return _pointwise(model)


def _negative(ev: Evaluator, node: Any, index: Index) -> Term:
    (source,) = arguments(node, "self")
    return -integer(ev.at(source, index))


def _absolute(ev: Evaluator, node: Any, index: Index) -> Term:
    (source,) = arguments(node, "self")
    term = integer(ev.at(source, index))
    return z3.If(term < 0, -term, term)


def _overloads(name: str, *overloads: str) -> Iterator[Any]:
    for overload in overloads or ("Tensor", "Scalar"):
        if hasattr(packet := getattr(aten, name), overload):
            yield getattr(packet, overload)


for _name, _combine, _place in (("add", operator.add, 1), ("sub", operator.sub, 1), ("rsub", _reversed_difference, 0)):
    MODELS.update(dict.fromkeys(_overloads(_name), _scaled(_combine, _place)))
MODELS.update(dict.fromkeys(_overloads("mul"), _arithmetic(product)))
MODELS.update(dict.fromkeys(_overloads("remainder"), _arithmetic(_remainder, floats=_quotient)))
MODELS.update(dict.fromkeys(_overloads("floor_divide", "default", "Scalar"), _arithmetic(_floor, floats=_quotient)))
for _name, _combine in (("minimum", _smaller), ("maximum", _larger)):
    MODELS[getattr(aten, _name).default] = _arithmetic(_combine)
for _name, _compare in (
    ("le", operator.le), ("lt", operator.lt), ("ge", operator.ge),
    ("gt", operator.gt), ("eq", operator.eq), ("ne", operator.ne),
):  # fmt: skip
    MODELS.update(dict.fromkeys(_overloads(_name), _comparison(_compare)))
for _name, _gate in (("and", z3.And), ("or", z3.Or), ("xor", z3.Xor)):
    for _prefix, _suffix in (("__", "__"), ("bitwise_", "")):
        MODELS.update(dict.fromkeys(_overloads(f"{_prefix}{_name}{_suffix}"), _bitwise(_gate)))
    MODELS[getattr(aten, f"logical_{_name}").default] = _logical(_gate)
MODELS.update({aten.bitwise_not.default: _pointwise(_not), aten.logical_not.default: _pointwise(_not)})
MODELS.update(dict.fromkeys(_overloads("div", "Tensor_mode", "Scalar_mode"), _divide))
MODELS.update(dict.fromkeys(_overloads("div"), _quotient))
MODELS.update({aten.neg.default: _pointwise(_negative), aten.abs.default: _pointwise(_absolute)})
MODELS.update({
    aten.clamp.default: _clamp("min", "max"), aten.clamp_min.default: _clamp("min", None),
    aten.clamp_max.default: _clamp(None, "max"),
})  # fmt: skip
MODELS.update(
    dict.fromkeys((aten.exp.default, aten.isinf.default, aten.isnan.default, aten.relu.default), _pointwise(None))
)
