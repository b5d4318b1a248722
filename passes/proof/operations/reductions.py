"""Operations whose elements hang on a whole row; modelled where a proof about the row settles them."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
import z3

from passes.proof.operations.making import cast
from passes.proof.operations.registry import Model, arguments, models
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
    same_size,
)

if TYPE_CHECKING:
    from passes.proof.symbolic import Evaluator

aten = torch.ops.aten

MODELS: dict[Any, Model] = {}
_models = models(MODELS)


@_models(aten.diff.default)
def _diff(ev: Evaluator, node: Any, index: Index) -> Term:
    """First difference with an optional prepended slice of length 1, both in the type that torch joins them in."""
    source, order, dim, prepend, append = arguments(node, "self", "n", "dim", "prepend", "append")
    if order != 1 or append is not None or dtype_of(node) not in INTEGERS:
        raise Unmodelled("a difference of another order, or of another type")
    dim = ev.dim(source, dim)

    def element(of: Any, position: z3.ArithRef) -> Term:
        place = (*index[:dim], position, *index[dim + 1 :])
        return integer(cast(ev, ev.at(of, place), dtype_of(of), dtype_of(node), in_range(ev, of, place)))

    here = index[dim]
    if prepend is None:
        return element(source, here + 1) - element(source, here)
    if not same_size(prepend.meta["val"].shape[dim], 1):
        raise Unmodelled("more than one prepended element")
    before = z3.If(here == 0, element(prepend, z3.IntVal(0)), element(source, here - 1))
    return element(source, here) - before


def _constant_row(ev: Evaluator, source: Any, dim: int, node: Any, index: Index, candidates: tuple[int, ...]) -> int:
    """Which of ``candidates`` every element of the row through ``index`` is, proved."""
    step = z3.FreshInt("step")
    element = integer(ev.at(source, (*index[:dim], step, *index[dim + 1 :])))
    inside = [z3.And(step >= 0, step < ev.shape(source)[dim]), *in_range(ev, node, index)]
    for candidate in candidates:
        if ev.proves(element == candidate, *inside):
            return candidate
    raise Unmodelled("a row of varying elements")


@_models(aten.cumsum.default)
def _cumsum(ev: Evaluator, node: Any, index: Index) -> Term:
    """Modelled where the operand is provably one constant on the whole row: then it is that many times it."""
    source, dim = arguments(node, "self", "dim")
    if dtype_of(node) not in INTEGERS or dtype_of(source) in FLOATS:
        raise Unmodelled("a sum of fractions")
    dim = ev.dim(node, dim)
    return _constant_row(ev, source, dim, node, index, (0, 1)) * (index[dim] + 1)


@_models(operator.getitem)
def _getitem(ev: Evaluator, node: Any, index: Index) -> Term:
    """The running maximum or minimum of a row that is provably one constant is that constant."""
    made, item = node.args
    if made.target not in (aten.cummax.default, aten.cummin.default) or item != 0:
        raise Unmodelled("one of several results")
    source, dim = arguments(made, "self", "dim")
    if dtype_of(source) not in INTEGERS:
        raise Unmodelled("a running maximum of another type")
    return z3.IntVal(_constant_row(ev, source, ev.dim(source, dim), node, index, (0, 1)))


@_models(aten.any.dim, aten.all.dim)
def _any(ev: Evaluator, node: Any, index: Index) -> Term:
    """Modelled where a witness settles it: an element that is provably true, or none that can be."""
    source, dim, keepdim = arguments(node, "self", "dim", "keepdim")
    if dtype_of(source) != torch.bool:
        raise Unmodelled("any of numbers")
    dim = ev.dim(source, dim)
    around = (index[:dim], index[dim + 1 :] if keepdim else index[dim:])
    wanted = node.target is aten.any.dim
    size, inside = ev.shape(source)[dim], in_range(ev, node, index)

    def settles(position: z3.ArithRef) -> Term:
        element = boolean(ev.at(source, (*around[0], position, *around[1])))
        return element if wanted else z3.Not(element)

    others = [at for at in (*around[0], *around[1]) if not z3.is_int_value(at)]
    for witness in (z3.IntVal(0), size - 1, *others):
        if ev.proves(z3.And(witness >= 0, witness < size, settles(witness)), *inside):
            return z3.BoolVal(wanted)
    every = z3.FreshInt("every")
    if ev.proves(z3.Not(settles(every)), every >= 0, every < size, *inside):
        return z3.BoolVal(not wanted)
    raise Unmodelled("no witness")
