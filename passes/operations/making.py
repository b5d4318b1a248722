"""Tensors made of numbers and sizes, conversions between types, and choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import z3

from passes.operations.registry import Model, arguments, models
from passes.terms import (
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
    from passes.symbolic import Evaluator

aten = torch.ops.aten

MODELS: dict[Any, Model] = {}
_models = models(MODELS)


@_models(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(ev: Evaluator, node: Any, index: Index) -> Term:
    if dtype_of(node) not in INTEGERS:
        raise Unmodelled("a range of fractions")
    args = (0, *node.args) if len(node.args) == 1 else node.args
    step = ev.size(args[2]) if len(args) > 2 else z3.IntVal(1)
    term = z3.simplify(ev.size(args[0]) + product(index[0], step))
    return cast(ev, term, torch.int64, dtype_of(node), in_range(ev, node, index))


@_models(aten.full.default, aten.new_full.default, aten.full_like.default, aten.scalar_tensor.default)
def _full(ev: Evaluator, node: Any, index: Index) -> Term:
    fill = node.args[0] if node.target is aten.scalar_tensor.default else node.args[-1]
    return stored(ev, fill, node)


@_models(aten.new_ones.default, aten.ones.default, aten.ones_like.default)
def _ones(ev: Evaluator, node: Any, index: Index) -> Term:
    return literal(1, dtype_of(node))


@_models(aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default)
def _zeros(ev: Evaluator, node: Any, index: Index) -> Term:
    return literal(0, dtype_of(node))


def stored(ev: Evaluator, scalar: Any, node: Any) -> Term:
    """A scalar argument as an element of ``node``."""
    if isinstance(scalar, bool | int | float):
        return literal(scalar, dtype_of(node))
    return cast(ev, ev.at(scalar, ()), torch.int64, dtype_of(node), ())


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

    def convert(leaf: Term) -> Term:
        number = value_of(leaf)
        if target in INTEGERS and not torch.iinfo(target).min <= number <= torch.iinfo(target).max:
            raise Unmodelled(f"{number} as {target}: each device does something else")
        return literal(torch.tensor(number, dtype=source).to(target).item(), target)

    return leaf_by_leaf(convert, term)


@_models(aten._to_copy.default)
def _convert(ev: Evaluator, node: Any, index: Index) -> Term:
    return cast(ev, ev.at(node.args[0], index), dtype_of(node.args[0]), dtype_of(node), in_range(ev, node, index))


def choice(ev: Evaluator, operand: Any, node: Any, index: Index) -> Term:
    if not is_tensor(operand):
        return stored(ev, operand, node)
    term = ev.broadcast(operand, node, index)
    return cast(ev, term, dtype_of(operand), dtype_of(node), in_range(ev, node, index))


@_models(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(ev: Evaluator, node: Any, index: Index) -> Term:
    condition = boolean(ev.broadcast(node.args[0], node, index))
    yes, no = (choice(ev, operand, node, index) for operand in node.args[1:])
    return z3.If(condition, yes, no)


@_models(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(ev: Evaluator, node: Any, index: Index) -> Term:
    source, mask, value = node.args
    filled = boolean(ev.broadcast(mask, node, index))
    return z3.If(filled, choice(ev, value, node, index), ev.broadcast(source, node, index))


@_models(aten.tril.default, aten.triu.default)
def _triangle(ev: Evaluator, node: Any, index: Index) -> Term:
    source, diagonal = arguments(node, 0)
    row, column = index[-2:]
    distance, bound = column - row, ev.size(diagonal)
    keep = distance <= bound if node.target is aten.tril.default else distance >= bound
    return z3.If(keep, ev.at(source, index), literal(0, dtype_of(node)))


@_models(aten.constant_pad_nd.default)
def _pad(ev: Evaluator, node: Any, index: Index) -> Term:
    source, pads, value = arguments(node, None, 0)
    inner, exists = list(index), []
    for place, (before, size) in enumerate(zip(pads[::2], reversed(ev.shape(source)), strict=False)):
        at = len(index) - 1 - place
        inner[at] = index[at] - ev.size(before)
        exists.append(z3.And(inner[at] >= 0, inner[at] < size))
    return z3.If(z3.And(exists), ev.at(source, tuple(inner)), stored(ev, value, node))
