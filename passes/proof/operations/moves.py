"""Operations that put elements in other places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sympy
import torch
import z3

from passes.proof.operations.making import cast, choice
from passes.proof.operations.registry import Model, arguments, models
from passes.proof.terms import (
    Index,
    Term,
    Unmodelled,
    dtype_of,
    in_range,
    integer,
    positive,
    same_size,
    size_expression,
)

if TYPE_CHECKING:
    from passes.proof.symbolic import Evaluator

aten = torch.ops.aten

MODELS: dict[Any, Model] = {}
_models = models(MODELS)

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


@_models(aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
def _same(ev: Evaluator, node: Any, index: Index) -> Term:
    (source,) = arguments(node, "self")
    return ev.at(source, index)


@_models(aten.copy.default)
def _copy(ev: Evaluator, node: Any, index: Index) -> Term:
    _onto, source = arguments(node, "self", "src")
    return choice(ev, source, node, index)


@_models(aten.expand.default)
def _expand(ev: Evaluator, node: Any, index: Index) -> Term:
    (source,) = arguments(node, "self")
    return ev.broadcast(source, node, index)


@_models(aten.unsqueeze.default)
def _unsqueeze(ev: Evaluator, node: Any, index: Index) -> Term:
    source, dim = arguments(node, "self", "dim")
    dim = ev.dim(node, dim)
    return ev.at(source, index[:dim] + index[dim + 1 :])


@_models(aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(ev: Evaluator, node: Any, index: Index) -> Term:
    source, dims = arguments(node, "self", "dim")
    gone = {ev.dim(source, dim) for dim in ([dims] if isinstance(dims, int) else dims)}
    if not all(same_size(source.meta["val"].shape[dim], 1) for dim in gone):
        raise Unmodelled("a squeeze of a size that may not be 1")
    rest = iter(index)
    return ev.at(source, tuple(z3.IntVal(0) if dim in gone else next(rest) for dim in range(source.meta["val"].dim())))


@_models(aten.permute.default)
def _permute(ev: Evaluator, node: Any, index: Index) -> Term:
    source, dims = arguments(node, "self", "dims")
    inner: list[Any] = [None] * len(index)
    for item, dim in zip(index, dims, strict=True):
        inner[ev.dim(node, dim)] = item
    return ev.at(source, tuple(inner))


@_models(aten.transpose.int)
def _transpose(ev: Evaluator, node: Any, index: Index) -> Term:
    source, *dims = arguments(node, "self", "dim0", "dim1")
    a, b = (ev.dim(node, dim) for dim in dims)
    inner = list(index)
    inner[a], inner[b] = index[b], index[a]
    return ev.at(source, tuple(inner))


@_models(aten.t.default)
def _t(ev: Evaluator, node: Any, index: Index) -> Term:
    (source,) = arguments(node, "self")
    return ev.at(source, index[::-1])  # two dimensions at most


def _bound(ev: Evaluator, position: Any, size: z3.ArithRef, default: int) -> z3.ArithRef:
    """A slice's bound by Python's rule: negative ones count from the end, and everything is clamped to the size."""
    term = ev.size(default if position is None else position)
    term = z3.If(term < 0, z3.If(term + size < 0, 0, term + size), z3.If(term > size, size, term))
    return z3.simplify(term)


@_models(aten.slice.Tensor)
def _slice(ev: Evaluator, node: Any, index: Index) -> Term:
    source, dim, start, _end, step = arguments(node, "self", "dim", "start", "end", "step")
    dim = ev.dim(source, dim)
    first = _bound(ev, start, ev.shape(source)[dim], 0)
    return ev.at(source, (*index[:dim], z3.simplify(index[dim] * ev.size(step) + first), *index[dim + 1 :]))


@_models(aten.slice_scatter.default)
def _slice_scatter(ev: Evaluator, node: Any, index: Index) -> Term:
    target, source, dim, start, end, step = arguments(node, "self", "src", "dim", "start", "end", "step")
    if step != 1 or dtype_of(source) != dtype_of(node):
        raise Unmodelled("a slice with a step, or of another type")
    dim = ev.dim(node, dim)
    size = ev.shape(target)[dim]
    first = _bound(ev, start, size, 0)
    last = size if end is None else _bound(ev, end, size, 0)
    here = index[dim]
    inner = (*index[:dim], z3.simplify(here - first), *index[dim + 1 :])
    return z3.If(z3.And(here >= first, here < last), ev.at(source, inner), ev.at(target, index))


@_models(aten.select.int)
def _select(ev: Evaluator, node: Any, index: Index) -> Term:
    source, dim, position = arguments(node, "self", "dim", "index")
    dim, chosen = ev.dim(source, dim), ev.size(position)
    chosen = z3.If(chosen < 0, chosen + ev.shape(source)[dim], chosen)
    return ev.at(source, (*index[:dim], z3.simplify(chosen), *index[dim:]))


@_models(aten.flip.default)
def _flip(ev: Evaluator, node: Any, index: Index) -> Term:
    source, dims = arguments(node, "self", "dims")
    turned, sizes = {ev.dim(node, dim) for dim in dims}, ev.shape(node)
    return ev.at(source, tuple(sizes[d] - 1 - at if d in turned else at for d, at in enumerate(index)))


@_models(aten.repeat.default)
def _repeat(ev: Evaluator, node: Any, index: Index) -> Term:
    source, repeats = arguments(node, "self", "repeats")
    shape, inner = source.meta["val"].shape, []
    new = len(index) - len(shape)  # dimensions, all in front
    for at, size, times in zip(index[new:], shape, repeats[new:], strict=True):
        if same_size(size, 1):
            inner.append(z3.IntVal(0))
        elif times == 1:
            inner.append(at)
        else:
            inner.append(at % positive(ev.size(size)))
    return ev.at(source, tuple(inner))


@_models(aten.index.Tensor)
def _index(ev: Evaluator, node: Any, index: Index) -> Term:
    source, positions = arguments(node, "self", "indices")
    given = [dim for dim, position in enumerate(positions) if position is not None]
    if not given or any(dtype_of(positions[dim]) not in (torch.int64, torch.int32) for dim in given):
        raise Unmodelled("an index of another type")  # booleans and bytes are masks
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
        where = integer(ev.at(position, ev.align(position.meta["val"].shape, target, picked)))
        inner.append(z3.simplify(z3.If(where < 0, where + shape[dim], where)))
    return ev.at(source, tuple(inner))


@_models(aten.index_select.default, aten.gather.default)
def _pick(ev: Evaluator, node: Any, index: Index) -> Term:
    """Positions below zero are an error here, unlike in ``index``."""
    source, dim, positions = arguments(node, "self", "dim", "index")
    dim = ev.dim(source, dim)
    along = index if node.target is aten.gather.default else (index[dim],)
    return ev.at(source, (*index[:dim], z3.simplify(integer(ev.at(positions, along))), *index[dim + 1 :]))


@_models(aten.cat.default)
def _cat(ev: Evaluator, node: Any, index: Index) -> Term:
    parts, dim = arguments(node, "tensors", "dim")
    dim = ev.dim(node, dim)
    if any(part.meta["val"].dim() != len(index) for part in parts):
        raise Unmodelled("a concatenation with torch's empty 1-D tensor")
    position, pieces = index[dim], []
    for part in parts:
        size, place = ev.shape(part)[dim], (*index[:dim], position, *index[dim + 1 :])
        pieces.append((position, size, _part(ev, part, node, place)))
        position = position - size
    result = pieces[-1][2]
    for where, size, element in reversed(pieces[:-1]):
        result = z3.If(where < size, element, result)
    return result


@_models(aten.stack.default)
def _stack(ev: Evaluator, node: Any, index: Index) -> Term:
    parts, dim = arguments(node, "tensors", "dim")
    dim = ev.dim(node, dim)
    elements = [_part(ev, part, node, index[:dim] + index[dim + 1 :]) for part in parts]
    result = elements[-1]
    for place in range(len(parts) - 2, -1, -1):
        result = z3.If(index[dim] == place, elements[place], result)
    return result


def _part(ev: Evaluator, part: Any, node: Any, index: Index) -> Term:
    """The element of one of the tensors that ``node`` joins, in the type of ``node``."""
    return cast(ev, ev.at(part, index), dtype_of(part), dtype_of(node), in_range(ev, part, index))


@_models(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten._reshape_copy.default)
def _view(ev: Evaluator, node: Any, index: Index) -> Term:
    """Splits and merges of neighbouring dimensions; sizes inside a split or merge must be static but the first."""
    (source,) = arguments(node, "self")
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
