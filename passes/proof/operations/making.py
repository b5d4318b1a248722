"""Tensors made of numbers and sizes, conversions between types, and choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import z3

from passes.proof.operations.registry import Model, arguments, models
from passes.proof.terms import (
    FLOATS,
    INTEGERS,
    Index,
    Term,
    Unmodelled,
    boolean,
    dtype_of,
    fits,
    in_range,
    integer,
    is_tensor,
    leaf_by_leaf,
    literal,
    product,
    value_of,
)

if TYPE_CHECKING:
    from passes.proof.symbolic import Evaluator

aten = torch.ops.aten

MODELS: dict[Any, Model] = {}
_models = models(MODELS)


@_models(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(ev: Evaluator, node: Any, index: Index) -> Term:
    if dtype_of(node) not in INTEGERS:
        raise Unmodelled("a range of fractions")
    start, step = 0, 1
    if node.target is aten.arange.start_step:
        start, _end, step = arguments(node, "start", "end", "step")
    elif node.target is aten.arange.start:
        start, _end = arguments(node, "start", "end")
    else:
        arguments(node, "end")
    term = z3.simplify(ev.size(start) + product(index[0], ev.size(step)))
    return cast(ev, term, torch.int64, dtype_of(node), in_range(ev, node, index))


@_models(aten.full.default)
def _full(ev: Evaluator, node: Any, index: Index) -> Term:
    (fill,) = arguments(node, "fill_value")
    return stored(ev, fill, node)


@_models(aten.new_full.default, aten.full_like.default)
def _full_like(ev: Evaluator, node: Any, index: Index) -> Term:
    _like, fill = arguments(node, "self", "fill_value")
    return stored(ev, fill, node)


@_models(aten.scalar_tensor.default)
def _scalar_tensor(ev: Evaluator, node: Any, index: Index) -> Term:
    (scalar,) = arguments(node, "s")
    return stored(ev, scalar, node)


@_models(aten.new_ones.default, aten.ones.default, aten.ones_like.default)
def _ones(ev: Evaluator, node: Any, index: Index) -> Term:
    return literal(1, dtype_of(node))


@_models(aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default)
def _zeros(ev: Evaluator, node: Any, index: Index) -> Term:
    return literal(0, dtype_of(node))


def stored(ev: Evaluator, scalar: Any, node: Any) -> Term:
    """A scalar argument as an element of ``node``."""
    return scalar_as(ev, scalar, dtype_of(node))


def scalar_as(ev: Evaluator, scalar: Any, dtype: torch.dtype) -> Term:
    """A scalar argument, a number or a size, as ``dtype``; raises :class:`Unmodelled` where it may not fit."""
    if isinstance(scalar, bool | int | float):
        return literal(scalar, dtype)
    return cast(ev, ev.size(scalar), torch.int64, dtype, ())


def cast(ev: Evaluator, term: Term, source: torch.dtype, target: torch.dtype, inside: Sequence[z3.BoolRef]) -> Term:
    """``term``, of type ``source``, in the type ``target``; ``inside`` are the premises under which it is read."""
    if source == target:
        return term
    if target == torch.bool and source in INTEGERS:
        return boolean(term)
    if target in INTEGERS and source in (torch.bool, *INTEGERS):
        term = integer(term)
        if source != torch.bool and not ev.proves(fits(term, target), *inside):
            raise Unmodelled(f"may not fit {target}")
        return term
    if not {source, target} <= {torch.bool, *INTEGERS, *FLOATS}:
        raise Unmodelled(f"{source} as {target}")

    def convert(leaf: Term) -> Term:
        number = value_of(leaf)
        if target in INTEGERS and not torch.iinfo(target).min <= number <= torch.iinfo(target).max:
            raise Unmodelled(f"{number} as {target}: each device does something else")
        return literal(torch.tensor(number, dtype=source).to(target).item(), target)

    return leaf_by_leaf(convert, term)


@_models(aten._to_copy.default)
def _convert(ev: Evaluator, node: Any, index: Index) -> Term:
    (source,) = arguments(node, "self")
    return cast(ev, ev.at(source, index), dtype_of(source), dtype_of(node), in_range(ev, node, index))


def choice(ev: Evaluator, operand: Any, node: Any, index: Index) -> Term:
    """The element of ``operand``, a tensor or a scalar, at ``index`` of ``node``, in the type of ``node``."""
    if not is_tensor(operand):
        return stored(ev, operand, node)
    term = ev.broadcast(operand, node, index)
    return cast(ev, term, dtype_of(operand), dtype_of(node), in_range(ev, node, index))


@_models(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(ev: Evaluator, node: Any, index: Index) -> Term:
    condition, yes, no = arguments(node, "condition", "self", "other")
    chosen = boolean(ev.broadcast(condition, node, index))
    return z3.If(chosen, choice(ev, yes, node, index), choice(ev, no, node, index))


@_models(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(ev: Evaluator, node: Any, index: Index) -> Term:
    source, mask, value = arguments(node, "self", "mask", "value")
    filled = boolean(ev.broadcast(mask, node, index))
    if is_tensor(value) and dtype_of(value) != dtype_of(node):  # torch takes its number, as if it were a scalar
        value = leaf_by_leaf(lambda leaf: literal(value_of(leaf), dtype_of(node)), ev.at(value, ()))
    else:
        value = choice(ev, value, node, index)
    return z3.If(filled, value, ev.broadcast(source, node, index))


@_models(aten.tril.default, aten.triu.default)
def _triangle(ev: Evaluator, node: Any, index: Index) -> Term:
    source, diagonal = arguments(node, "self", "diagonal")
    row, column = index[-2:]
    distance, bound = column - row, ev.size(diagonal)
    keep = distance <= bound if node.target is aten.tril.default else distance >= bound
    return z3.If(keep, ev.at(source, index), literal(0, dtype_of(node)))


@_models(aten.constant_pad_nd.default)
def _pad(ev: Evaluator, node: Any, index: Index) -> Term:
    source, pads, value = arguments(node, "self", "pad", "value")
    inner, exists = list(index), []
    for place, (before, size) in enumerate(zip(pads[::2], reversed(ev.shape(source)), strict=False)):
        at = len(index) - 1 - place
        inner[at] = index[at] - ev.size(before)
        exists.append(z3.And(inner[at] >= 0, inner[at] < size))
    return z3.If(z3.And(exists), ev.at(source, tuple(inner)), stored(ev, value, node))
