"""What each operation does to one element: the models that :class:`passes.symbolic.Evaluator` evaluates with.

A model gives the element of its node at an index, as a term over elements of the operands.  It raises
:class:`Unmodelled` where it does not know exactly; that costs proofs and never makes a wrong one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import sympy
import torch
import z3

from passes.terms import (
    FLOATS,
    INTEGERS,
    Index,
    Term,
    Unmodelled,
    align,
    boolean,
    dtype_of,
    integer,
    is_tensor,
    leaf_by_leaf,
    literal,
    same_size,
    size_expression,
    value_of,
)

if TYPE_CHECKING:
    from passes.symbolic import Evaluator

aten = torch.ops.aten

Model = Callable[["Evaluator", Any, Index], Term]
MODELS: dict[Any, Model] = {}
# Operations that only move elements, and so are modelled for every type.
MOVES = frozenset(
    [
        aten.alias.default, aten.cat.default, aten.clone.default, aten.detach.default, aten.expand.default,
        aten.flip.default, aten.gather.default, aten.index.Tensor, aten.index_select.default,
        aten.lift_fresh_copy.default,
        aten.permute.default, aten.repeat.default, aten.reshape.default, aten._reshape_copy.default, aten.select.int,
        aten.slice.Tensor, aten.slice_scatter.default, aten.squeeze.dim, aten.squeeze.dims, aten.stack.default,
        aten.t.default,
        aten.transpose.int, aten._unsafe_view.default, aten.unsqueeze.default, aten.view.default,
    ]
)  # fmt: skip


def _models(*targets: Any) -> Callable[[Model], Model]:
    def register(model: Model) -> Model:
        MODELS.update(dict.fromkeys(targets, model))
        return model

    return register


def _arguments(node: Any, *defaults: Any) -> tuple[Any, ...]:
    """The arguments of ``node`` with those that it leaves out; the first has no default."""
    return (*node.args, *defaults[len(node.args) - 1 :])


def in_range(ev: Evaluator, node: Any, index: Index) -> list[z3.BoolRef]:
    """``0 <= index < size`` for every dimension of ``node``."""
    return [z3.And(item >= 0, item < size) for item, size in zip(index, ev.shape(node), strict=True)]


# -- arithmetic, element by element ------------------------------------------------------------------


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


def _product(left: z3.ArithRef, right: z3.ArithRef) -> Term:
    if not (z3.is_int_value(z3.simplify(left)) or z3.is_int_value(z3.simplify(right))):
        raise Unmodelled("a product of two unknowns")
    return left * right


def _divisor(term: Term) -> int:
    divisor = z3.simplify(term)
    if not z3.is_int_value(divisor) or divisor.as_long() <= 0:
        raise Unmodelled("a divisor that is not a positive number")
    return int(divisor.as_long())


def _floor(left: z3.ArithRef, right: z3.ArithRef) -> Term:
    return left / _divisor(right)  # z3 rounds down for a positive divisor


def _truncated(left: z3.ArithRef, right: z3.ArithRef) -> Term:
    divisor = _divisor(right)
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
        aten.clamp.default: _arguments(node, None, None)[1:],
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
    ("add", operator.add), ("sub", operator.sub), ("rsub", lambda left, right: right - left), ("mul", _product),
    ("remainder", lambda left, right: left % _divisor(right)),
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


# -- tensors made of nothing -------------------------------------------------------------------------


@_models(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(ev: Evaluator, node: Any, index: Index) -> Term:
    if dtype_of(node) not in INTEGERS:
        raise Unmodelled("a range of fractions")
    args = node.args
    if len(args) == 1:
        return index[0]
    step = ev.size(args[2]) if len(args) > 2 else z3.IntVal(1)
    return ev.size(args[0]) + _product(index[0], step)


@_models(aten.full.default, aten.new_full.default, aten.full_like.default, aten.scalar_tensor.default)
def _full(ev: Evaluator, node: Any, index: Index) -> Term:
    fill = node.args[0] if node.target is aten.scalar_tensor.default else node.args[-1]
    return _stored(ev, fill, node)


@_models(aten.new_ones.default, aten.ones.default, aten.ones_like.default)
def _ones(ev: Evaluator, node: Any, index: Index) -> Term:
    return literal(1, dtype_of(node))


@_models(aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default)
def _zeros(ev: Evaluator, node: Any, index: Index) -> Term:
    return literal(0, dtype_of(node))


def _stored(ev: Evaluator, scalar: Any, node: Any) -> Term:
    """A scalar argument as an element of ``node``."""
    if isinstance(scalar, bool | int | float):
        return literal(scalar, dtype_of(node))
    return cast(ev, ev.at(scalar, ()), torch.int64, node, ())


# -- types -------------------------------------------------------------------------------------------


def cast(ev: Evaluator, term: Term, source: torch.dtype, node: Any, index: Index) -> Term:
    """``term``, an element of type ``source``, in the type of ``node``, whose element at ``index`` it becomes."""
    target = dtype_of(node)
    if source == target:
        return term
    if target == torch.bool and source in INTEGERS:
        return boolean(term)
    if target in INTEGERS and source in (torch.bool, *INTEGERS):
        term, limits = integer(term), torch.iinfo(target)
        inside = in_range(ev, node, index) if index else []
        if source != torch.bool and not ev.proves(z3.And(term >= limits.min, term <= limits.max), *inside):
            raise Unmodelled(f"may not fit {target}")
        return term

    def convert(leaf: Term) -> Term:
        return literal(torch.tensor(value_of(leaf), dtype=source).to(target).item(), target)

    return leaf_by_leaf(convert, term)


@_models(aten._to_copy.default)
def _convert(ev: Evaluator, node: Any, index: Index) -> Term:
    return cast(ev, ev.at(node.args[0], index), dtype_of(node.args[0]), node, index)


# -- choices -----------------------------------------------------------------------------------------


def _choice(ev: Evaluator, operand: Any, node: Any, index: Index) -> Term:
    if not is_tensor(operand):
        return _stored(ev, operand, node)
    return cast(ev, ev.broadcast(operand, node, index), dtype_of(operand), node, index)


@_models(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(ev: Evaluator, node: Any, index: Index) -> Term:
    condition = boolean(ev.broadcast(node.args[0], node, index))
    yes, no = (_choice(ev, operand, node, index) for operand in node.args[1:])
    return z3.If(condition, yes, no)


@_models(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(ev: Evaluator, node: Any, index: Index) -> Term:
    source, mask, value = node.args
    filled = boolean(ev.broadcast(mask, node, index))
    return z3.If(filled, _choice(ev, value, node, index), ev.broadcast(source, node, index))


@_models(aten.tril.default, aten.triu.default)
def _triangle(ev: Evaluator, node: Any, index: Index) -> Term:
    source, diagonal = _arguments(node, 0)
    row, column = index[-2:]
    distance, bound = column - row, ev.size(diagonal)
    keep = distance <= bound if node.target is aten.tril.default else distance >= bound
    return z3.If(keep, ev.at(source, index), literal(0, dtype_of(node)))


@_models(aten.constant_pad_nd.default)
def _pad(ev: Evaluator, node: Any, index: Index) -> Term:
    source, pads, value = _arguments(node, None, 0)
    inner, exists = list(index), []
    for place, (before, size) in enumerate(zip(pads[::2], reversed(ev.shape(source)), strict=False)):
        at = len(index) - 1 - place
        inner[at] = index[at] - ev.size(before)
        exists.append(z3.And(inner[at] >= 0, inner[at] < size))
    return z3.If(z3.And(exists), ev.at(source, tuple(inner)), _stored(ev, value, node))


# -- moves -------------------------------------------------------------------------------------------


@_models(aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
def _same(ev: Evaluator, node: Any, index: Index) -> Term:
    return ev.at(node.args[0], index)


@_models(aten.copy.default)
def _copy(ev: Evaluator, node: Any, index: Index) -> Term:
    return _choice(ev, node.args[1], node, index)


@_models(aten.expand.default)
def _expand(ev: Evaluator, node: Any, index: Index) -> Term:
    return ev.broadcast(node.args[0], node, index)


@_models(aten.unsqueeze.default)
def _unsqueeze(ev: Evaluator, node: Any, index: Index) -> Term:
    dim = ev.dim(node, node.args[1])
    return ev.at(node.args[0], index[:dim] + index[dim + 1 :])


@_models(aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(ev: Evaluator, node: Any, index: Index) -> Term:
    source = node.args[0]
    dims = [node.args[1]] if isinstance(node.args[1], int) else list(node.args[1])
    gone = {ev.dim(source, dim) for dim in dims}
    if not all(same_size(source.meta["val"].shape[dim], 1) for dim in gone):
        raise Unmodelled("a squeeze of a size that may not be 1")
    rest = iter(index)
    return ev.at(source, tuple(z3.IntVal(0) if dim in gone else next(rest) for dim in range(source.meta["val"].dim())))


@_models(aten.permute.default, aten.transpose.int, aten.t.default)
def _permute(ev: Evaluator, node: Any, index: Index) -> Term:
    rank = len(index)
    if node.target is aten.permute.default:
        order = [ev.dim(node, dim) for dim in node.args[1]]
    else:
        order = list(range(rank))
        dims = node.args[1:3] if node.target is aten.transpose.int else (0, rank - 1)
        a, b = (ev.dim(node, dim) for dim in dims)
        order[a], order[b] = order[b], order[a]
    source: list[Any] = [None] * rank
    for position, dim in enumerate(order):
        source[dim] = index[position]
    return ev.at(node.args[0], tuple(source))


def _bound(ev: Evaluator, position: Any, size: z3.ArithRef, default: int) -> z3.ArithRef:
    """A slice's bound by Python's rule: negative ones count from the end, and everything is clamped to the size."""
    term = ev.size(default if position is None else position)
    term = z3.If(term < 0, z3.If(term + size < 0, 0, term + size), z3.If(term > size, size, term))
    return z3.simplify(term)


@_models(aten.slice.Tensor)
def _slice(ev: Evaluator, node: Any, index: Index) -> Term:
    source, dim, start, _end, step = _arguments(node, 0, None, None, 1)
    dim = ev.dim(source, dim)
    first = _bound(ev, start, ev.shape(source)[dim], 0)
    return ev.at(source, (*index[:dim], z3.simplify(index[dim] * ev.size(step) + first), *index[dim + 1 :]))


@_models(aten.slice_scatter.default)
def _slice_scatter(ev: Evaluator, node: Any, index: Index) -> Term:
    target, source, dim, start, end, step = _arguments(node, None, 0, None, None, 1)
    if step != 1:
        raise Unmodelled("a slice with a step")
    dim = ev.dim(node, dim)
    size = ev.shape(target)[dim]
    first = _bound(ev, start, size, 0)
    last = size if end is None else _bound(ev, end, size, 0)
    here = index[dim]
    inner = (*index[:dim], z3.simplify(here - first), *index[dim + 1 :])
    return z3.If(z3.And(here >= first, here < last), ev.at(source, inner), ev.at(target, index))


@_models(aten.select.int)
def _select(ev: Evaluator, node: Any, index: Index) -> Term:
    source, dim, position = node.args
    dim, chosen = ev.dim(source, dim), ev.size(position)
    chosen = z3.If(chosen < 0, chosen + ev.shape(source)[dim], chosen)
    return ev.at(source, (*index[:dim], z3.simplify(chosen), *index[dim:]))


@_models(aten.flip.default)
def _flip(ev: Evaluator, node: Any, index: Index) -> Term:
    turned = {ev.dim(node, dim) for dim in node.args[1]}
    sizes = ev.shape(node)
    return ev.at(node.args[0], tuple(sizes[d] - 1 - at if d in turned else at for d, at in enumerate(index)))


@_models(aten.repeat.default)
def _repeat(ev: Evaluator, node: Any, index: Index) -> Term:
    source = node.args[0]
    shape, inner = source.meta["val"].shape, []
    for at, size, times in zip(index[len(index) - len(shape) :], shape, node.args[1][-len(shape) :], strict=True):
        if same_size(size, 1):
            inner.append(z3.IntVal(0))
        elif times == 1:
            inner.append(at)
        else:
            inner.append(at % _divisor(ev.size(size)))
    return ev.at(source, tuple(inner))


@_models(aten.index.Tensor)
def _index(ev: Evaluator, node: Any, index: Index) -> Term:
    source, positions = node.args
    given = [dim for dim, position in enumerate(positions) if position is not None]
    if any(dtype_of(positions[dim]) not in INTEGERS for dim in given):
        raise Unmodelled("an index of another type")
    rank = max(positions[dim].meta["val"].dim() for dim in given)
    # torch's rule: indices side by side leave their dimensions where they are, others put them first.
    at = given[0] if given == list(range(given[0], given[-1] + 1)) else 0
    picked, rest = index[at : at + rank], iter((*index[:at], *index[at + rank :]))
    target = node.meta["val"].shape[at : at + rank]
    shape, inner = ev.shape(source), []
    for dim in range(len(shape)):
        if dim not in given:
            inner.append(next(rest))
            continue
        position = positions[dim]
        where = integer(ev.at(position, align(position.meta["val"].shape, target, picked)))
        inner.append(z3.simplify(z3.If(where < 0, where + shape[dim], where)))
    return ev.at(source, tuple(inner))


@_models(aten.index_select.default, aten.gather.default)
def _pick(ev: Evaluator, node: Any, index: Index) -> Term:
    """Positions below zero are an error here, unlike in ``index``."""
    source, dim, positions = node.args[:3]
    dim = ev.dim(source, dim)
    along = index if node.target is aten.gather.default else (index[dim],)
    return ev.at(source, (*index[:dim], z3.simplify(integer(ev.at(positions, along))), *index[dim + 1 :]))


@_models(aten.cat.default)
def _cat(ev: Evaluator, node: Any, index: Index) -> Term:
    parts = node.args[0]
    dim = ev.dim(node, node.args[1] if len(node.args) > 1 else 0)
    kind = (dtype_of(node), node.meta["val"].dim())
    if not all((dtype_of(part), part.meta["val"].dim()) == kind for part in parts):
        raise Unmodelled("a concatenation of mixed types, or with torch's empty 1-D tensor")
    position, pieces = index[dim], []
    for part in parts:
        pieces.append((position, ev.shape(part)[dim], part))
        position = position - pieces[-1][1]
    result = ev.at(pieces[-1][2], (*index[:dim], pieces[-1][0], *index[dim + 1 :]))
    for where, size, part in reversed(pieces[:-1]):
        result = z3.If(where < size, ev.at(part, (*index[:dim], where, *index[dim + 1 :])), result)
    return result


@_models(aten.stack.default)
def _stack(ev: Evaluator, node: Any, index: Index) -> Term:
    parts = node.args[0]
    dim = ev.dim(node, node.args[1] if len(node.args) > 1 else 0)
    if any(dtype_of(part) != dtype_of(node) for part in parts):
        raise Unmodelled("a stack of mixed types")
    rest = index[:dim] + index[dim + 1 :]
    result = ev.at(parts[-1], rest)
    for place in range(len(parts) - 2, -1, -1):
        result = z3.If(index[dim] == place, ev.at(parts[place], rest), result)
    return result


@_models(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten._reshape_copy.default)
def _view(ev: Evaluator, node: Any, index: Index) -> Term:
    """Splits and merges of neighbouring dimensions; sizes inside a split or merge must be static but the first."""
    source = node.args[0]
    before = [size_expression(size) for size in source.meta["val"].shape]
    after = [size_expression(size) for size in node.meta["val"].shape]
    rest, result = list(index), []
    while before or after:
        left, right = before[:1], after[:1]  # the smallest runs of dimensions with equal volume
        del before[:1], after[:1]
        while (ratio := sympy.prod(right) / sympy.prod(left)) != 1:
            grow, pool = (left, before) if ratio.is_integer else (right, after)
            if not pool:
                raise Unmodelled("a reshape whose dimensions do not line up")
            grow.append(pool.pop(0))
        here, rest = rest[: len(right)], rest[len(right) :]
        if len(left) == len(right) == 1:
            result += here
            continue
        ones_left, ones_right = ([size for size in sizes if size != 1] for sizes in (left, right))
        if ones_left == ones_right:  # sizes of 1 that come or go
            moved = iter([at for at, size in zip(here, right, strict=True) if size != 1])
            result += [z3.IntVal(0) if size == 1 else next(moved) for size in left]
            continue
        if not all(size.is_Integer for size in (*left[1:], *right[1:])):
            raise Unmodelled("a reshape across a dynamic size")
        flat: z3.ArithRef = z3.IntVal(0)
        for size, item in zip(right, here, strict=True):
            flat = flat * int(size) + item if size.is_Integer else item
        unpacked: list[z3.ArithRef] = []
        for size in reversed(left[1:]):
            unpacked.insert(0, flat % int(size))
            flat = flat / int(size)
        result += [flat, *unpacked][: len(left)]
    return ev.at(source, tuple(z3.simplify(item) for item in result))


# -- reductions --------------------------------------------------------------------------------------


@_models(aten.diff.default)
def _diff(ev: Evaluator, node: Any, index: Index) -> Term:
    """First difference with an optional prepended slice of length 1."""
    source, order, dim, prepend, append = _arguments(node, 1, -1, None, None)
    if order != 1 or append is not None or dtype_of(source) not in INTEGERS:
        raise Unmodelled("a difference of another order")
    dim = ev.dim(source, dim)

    def element(position: z3.ArithRef) -> Term:
        return ev.at(source, (*index[:dim], position, *index[dim + 1 :]))

    here = index[dim]
    if prepend is None:
        return element(here + 1) - element(here)
    if not same_size(prepend.meta["val"].shape[dim], 1):
        raise Unmodelled("more than one prepended element")
    before = ev.at(prepend, (*index[:dim], z3.IntVal(0), *index[dim + 1 :]))
    return z3.If(here == 0, element(here) - before, element(here) - element(here - 1))


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
    if dtype_of(node) not in INTEGERS or dtype_of(node.args[0]) in FLOATS:
        raise Unmodelled("a sum of fractions")
    source, dim = node.args[0], ev.dim(node, node.args[1])
    return _constant_row(ev, source, dim, node, index, (0, 1)) * (index[dim] + 1)


@_models(operator.getitem)
def _getitem(ev: Evaluator, node: Any, index: Index) -> Term:
    """The running maximum or minimum of a row that is provably one constant is that constant."""
    made, item = node.args
    if made.target not in (aten.cummax.default, aten.cummin.default) or item != 0:
        raise Unmodelled("one of several results")
    source = made.args[0]
    if dtype_of(source) not in INTEGERS:
        raise Unmodelled("a running maximum of another type")
    return z3.IntVal(_constant_row(ev, source, ev.dim(source, made.args[1]), node, index, (0, 1)))


@_models(aten.any.dim, aten.all.dim)
def _any(ev: Evaluator, node: Any, index: Index) -> Term:
    """Modelled where a witness settles it: an element that is provably true, or none that can be."""
    source, dim, keepdim = _arguments(node, 0, False)
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
