"""The value of a graph's tensors at one symbolic position, as SMT terms.

``Evaluator.at(node, index)`` is the element ``node[index]`` where ``index`` holds integer terms: integers
of the graph become unbounded integers, booleans become booleans, and sizes become terms over the shape
symbols of ``torch.export``.  An operation without a model becomes an uninterpreted function of its index,
and so does a run-time input: neither can help a proof, so what is proved is true whatever they hold.

Two things keep "unbounded" honest.  Only 64-bit integers are modelled, and arithmetic is given up unless it
provably stays within 64 bits.  Out-of-range indices are an error in PyTorch, so an element that is read is one
that exists.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import sympy
import torch
import z3
from torch.fx import Node

aten = torch.ops.aten
Term: TypeAlias = Any
"""A z3 expression; z3 ships no types."""
Index: TypeAlias = tuple[Any, ...]

INT64_MAX = 2**63 - 1
SOLVER_TIMEOUT_MS = 2000


def symbol_ranges(program: torch.export.ExportedProgram) -> dict[str, tuple[int, int]]:
    """Inclusive bounds of every shape symbol of ``program``; a side without a bound is 0 or 64 bits.

    torch.export writes 2 where it only means "not specialised to 0 or 1" and enforces nothing, so no lower
    bound above 1 is relied on: a proof on a wider range holds on the narrower one.
    """
    ranges = {}
    for symbol, interval in program.range_constraints.items():
        low, high = interval.lower, interval.upper
        ranges[str(symbol)] = (min(int(low), 1) if low.is_Integer else 0, int(high) if high.is_Integer else INT64_MAX)
    return ranges


class Unmodelled(Exception):
    """This element has no model; it becomes an uninterpreted function."""


class Evaluator:
    """Terms for the elements of one functional graph (after ``ExportedProgram.run_decompositions({})``).

    ``ranges`` maps the shape symbols' names to their inclusive bounds.  ``opaque`` names nodes that are
    not looked into (used to ask how one tensor is made of another).
    """

    def __init__(
        self,
        ranges: dict[str, tuple[int, int]],
        constants: dict[str, torch.Tensor] | None = None,
        opaque: frozenset[Node] = frozenset(),
    ) -> None:
        self.ranges = ranges
        self.constants = constants or {}
        self.opaque = opaque
        self.premises: list[z3.BoolRef] = []
        self.inputs: dict[str, str] = {}
        """Name of each uninterpreted function -> the placeholder or operation that it stands for."""
        self._symbols: dict[str, z3.ArithRef] = {}
        self._unknown_sizes: dict[str, z3.ArithRef] = {}

    # -- sizes ---------------------------------------------------------------------------------------

    def size(self, value: int | torch.SymInt | Node) -> z3.ArithRef:
        """A size, or an integer argument, as a term."""
        if isinstance(value, Node):
            value = value.meta["val"]
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise Unmodelled(f"{value!r} is not an integer")
        if isinstance(value, int):
            return z3.IntVal(value)
        return self._from_sympy(value.node.expr)

    def shape(self, node: Node) -> tuple[z3.ArithRef, ...]:
        return tuple(self.size(extent) for extent in node.meta["val"].shape)

    def _from_sympy(self, expression: sympy.Expr) -> z3.ArithRef:
        if expression.is_Integer:
            return z3.IntVal(int(expression))
        if expression.is_Symbol:
            return self._symbol(expression.name)
        parts = [self._from_sympy(part) for part in expression.args]
        if expression.is_Add:
            return z3.Sum(parts)
        if expression.is_Mul and sum(not z3.is_int_value(part) for part in parts) <= 1:
            return z3.Product(parts)
        name = type(expression).__name__
        if name in ("FloorDiv", "Mod", "PythonMod") and z3.is_int_value(parts[1]) and parts[1].as_long() > 0:
            return parts[0] / parts[1] if name == "FloorDiv" else parts[0] % parts[1]
        if name in ("Max", "Min"):
            result = parts[0]
            for part in parts[1:]:
                result = z3.If(part > result, part, result) if name == "Max" else z3.If(part < result, part, result)
            return result
        # Anything else: some integer about which nothing is known.
        return self._unknown_sizes.setdefault(str(expression), z3.Int(f"size<{expression}>"))

    def _symbol(self, name: str) -> z3.ArithRef:
        if name not in self._symbols:
            symbol = z3.Int(name)
            low, high = self.ranges.get(name, (0, INT64_MAX))
            self.premises += [symbol >= low, symbol <= high]
            self._symbols[name] = symbol
        return self._symbols[name]

    # -- the solver ----------------------------------------------------------------------------------

    def solver(self) -> z3.Solver:
        solver = z3.Solver()
        solver.set("timeout", SOLVER_TIMEOUT_MS)
        solver.add(self.premises)
        return solver

    def proves(self, claim: z3.BoolRef, *assumptions: z3.BoolRef) -> bool:
        """Whether ``claim`` follows; a time-out is a no.  Contradictory assumptions prove nothing here."""
        solver = self.solver()
        solver.add(*assumptions)
        if solver.check() != z3.sat:
            return False
        solver.add(z3.Not(claim))
        return bool(solver.check() == z3.unsat)

    # -- elements ------------------------------------------------------------------------------------

    def at(self, node: Any, index: Index) -> Term:
        """The element of ``node`` at ``index``: an integer or boolean term.  Numbers stand for themselves."""
        if isinstance(node, bool):
            return z3.BoolVal(node)
        if isinstance(node, int):
            return z3.IntVal(node)
        if not isinstance(node, Node):
            raise Unmodelled(f"{node!r}")
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | int):
            return self.size(value)
        if node.op == "call_function" and node not in self.opaque:
            model = MODELS.get(node.target)
            if model is not None and (_exact(value) or node.target in MOVES):
                try:
                    term = model(self, node, index)
                    return term if node.target in MOVES else self._bounded(term, node, index)
                except Unmodelled:
                    pass
        constant = self.constants.get(node.name)
        if constant is not None and constant.numel() == 1 and _exact(constant):
            item = constant.item()
            return z3.BoolVal(item) if isinstance(item, bool) else z3.IntVal(int(item))
        return self._uninterpreted(node, index)

    def _uninterpreted(self, node: Node, index: Index) -> Term:
        value = node.meta.get("val")
        boolean = isinstance(value, torch.Tensor) and value.dtype == torch.bool
        name = f"{node.name}[]"
        self.inputs[name] = node.name
        function = z3.Function(name, *[z3.IntSort()] * len(index), z3.BoolSort() if boolean else z3.IntSort())
        return function(*index)

    def _bounded(self, term: Term, node: Node, index: Index) -> Term:
        """``term``, the element ``node[index]``, if it cannot leave 64 bits where that element exists.

        A term without operator (a number, an index, an element of an input) is not computed and cannot.
        """
        if z3.is_arith(term) and term.decl().kind() != z3.Z3_OP_UNINTERPRETED and not z3.is_int_value(term):
            within = z3.And(term >= -INT64_MAX, term <= INT64_MAX)
            if not self.proves(within, *in_range(self, node, index)):
                raise Unmodelled("may overflow 64 bits")
        return term

    def reads(self, term: Term) -> set[str]:
        """Names of the placeholders and operations whose values ``term`` hangs on."""
        found: set[str] = set()
        pending, seen = [term], set()
        while pending:
            current = pending.pop()
            if current.get_id() in seen:
                continue
            seen.add(current.get_id())
            if z3.is_app(current):
                if current.decl().name() in self.inputs:
                    found.add(self.inputs[current.decl().name()])
                pending.extend(current.children())
        return found

    # -- helpers of the models -----------------------------------------------------------------------

    def broadcast(self, operand: Any, node: Node, index: Index) -> Term:
        """The element of ``operand`` that meets ``index`` of ``node`` under broadcasting."""
        if not isinstance(operand, Node) or not isinstance(operand.meta.get("val"), torch.Tensor):
            return self.at(operand, ())
        return self.at(operand, _align(operand.meta["val"].shape, node.meta["val"].shape, index))

    def dim(self, node: Node, dim: int) -> int:
        rank = node.meta["val"].dim()
        return dim + rank if dim < 0 else dim


def _exact(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.bool)


def size_expression(size: Any) -> sympy.Expr:
    """A size as an expression; unlike ``==`` on a SymInt this never asks, or installs, a shape guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _same_size(a: Any, b: Any) -> bool:
    return bool(size_expression(a) == size_expression(b))


def _align(shape: Sequence[Any], target: Sequence[Any], index: Index) -> Index:
    tail = index[len(index) - len(shape) :]
    result = []
    for extent, wanted, position in zip(shape, target[len(target) - len(shape) :], tail, strict=True):
        if _same_size(extent, 1):
            result.append(z3.IntVal(0))
        elif _same_size(extent, wanted):
            result.append(position)
        else:
            raise Unmodelled("a size that may or may not broadcast")
    return tuple(result)


def _integer(term: Term) -> z3.ArithRef:
    return z3.If(term, z3.IntVal(1), z3.IntVal(0)) if z3.is_bool(term) else term


def _boolean(term: Term) -> z3.BoolRef:
    return term if z3.is_bool(term) else term != 0


Model = Callable[[Evaluator, Node, Index], Term]
MODELS: dict[Any, Model] = {}
# Operations that only move elements, and so are modelled for every type.
MOVES = frozenset(
    [
        aten.alias.default, aten.cat.default, aten.clone.default, aten.detach.default, aten.expand.default,
        aten.index.Tensor, aten.permute.default, aten.reshape.default, aten._reshape_copy.default, aten.select.int,
        aten.slice.Tensor, aten.squeeze.dim, aten.squeeze.dims, aten.transpose.int, aten._unsafe_view.default,
        aten.unsqueeze.default, aten.view.default,
    ]
)  # fmt: skip


def _models(*targets: Any) -> Callable[[Model], Model]:
    def register(model: Model) -> Model:
        MODELS.update(dict.fromkeys(targets, model))
        return model

    return register


def _arithmetic(combine: Callable[[Any, Any], Term]) -> Model:
    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        if node.meta["val"].dtype != torch.int64:
            raise Unmodelled("arithmetic on booleans")
        left, right = (_integer(ev.broadcast(operand, node, index)) for operand in node.args[:2])
        alpha = node.args[2] if len(node.args) > 2 else node.kwargs.get("alpha", 1)
        return combine(left, right if alpha == 1 else right * ev.size(alpha))

    return model


def _product(left: z3.ArithRef, right: z3.ArithRef) -> Term:
    if not (z3.is_int_value(z3.simplify(left)) or z3.is_int_value(z3.simplify(right))):
        raise Unmodelled("a product of two unknowns")
    return left * right


def _comparison(compare: Callable[[Any, Any], Any]) -> Model:
    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        # The result is boolean whatever the operands are, so they must be exact themselves.
        if not all(_exact(arg.meta["val"]) for arg in node.args[:2] if _is_tensor(arg)):
            raise Unmodelled("a comparison of inexact numbers")
        left, right = (_integer(ev.broadcast(operand, node, index)) for operand in node.args[:2])
        return compare(left, right)

    return model


def _arguments(node: Any, *defaults: Any) -> tuple[Any, ...]:
    """The arguments of ``node`` with those that it leaves out; the first has no default."""
    return (*node.args, *defaults[len(node.args) - 1 :])


def _is_tensor(argument: Any) -> bool:
    return isinstance(argument, Node) and isinstance(argument.meta.get("val"), torch.Tensor)


def _logical(combine: Callable[..., Any]) -> Model:
    def model(ev: Evaluator, node: Any, index: Index) -> Term:
        operands = [ev.broadcast(operand, node, index) for operand in node.args[:2]]
        if node.target not in LOGICAL and not all(z3.is_bool(operand) for operand in operands):
            raise Unmodelled("bitwise arithmetic")
        return combine(*(_boolean(operand) for operand in operands))

    return model


LOGICAL = (aten.logical_and.default, aten.logical_or.default, aten.logical_not.default, aten.logical_xor.default)

MODELS.update(dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _arithmetic(operator.add)))
MODELS.update(dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _arithmetic(operator.sub)))
MODELS.update(dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _arithmetic(_product)))
for _name, _compare in (
    ("le", operator.le), ("lt", operator.lt), ("ge", operator.ge),
    ("gt", operator.gt), ("eq", operator.eq), ("ne", operator.ne),
):  # fmt: skip
    for _overload in ("Tensor", "Scalar"):
        MODELS[getattr(getattr(aten, _name), _overload)] = _comparison(_compare)
MODELS.update(dict.fromkeys((aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default), _logical(z3.And)))
MODELS.update(dict.fromkeys((aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default), _logical(z3.Or)))
MODELS.update(dict.fromkeys((aten.bitwise_not.default, aten.logical_not.default), _logical(z3.Not)))


@_models(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(ev: Evaluator, node: Any, index: Index) -> Term:
    args = node.args
    if len(args) == 1:
        return index[0]
    step = ev.size(args[2]) if len(args) > 2 else z3.IntVal(1)
    return ev.size(args[0]) + _product(index[0], step)


@_models(aten.full.default, aten.new_full.default)
def _full(ev: Evaluator, node: Any, index: Index) -> Term:
    fill = node.args[-1]
    if not isinstance(fill, int | Node):
        raise Unmodelled("a fraction")
    term = ev.at(fill, ())
    return _boolean(term) if node.meta["val"].dtype == torch.bool else _integer(term)


@_models(aten.new_ones.default, aten.ones.default, aten.ones_like.default)
def _ones(ev: Evaluator, node: Any, index: Index) -> Term:
    return z3.BoolVal(True) if node.meta["val"].dtype == torch.bool else z3.IntVal(1)


@_models(aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default)
def _zeros(ev: Evaluator, node: Any, index: Index) -> Term:
    return z3.BoolVal(False) if node.meta["val"].dtype == torch.bool else z3.IntVal(0)


@_models(aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
def _same(ev: Evaluator, node: Any, index: Index) -> Term:
    return ev.at(node.args[0], index)


@_models(aten._to_copy.default)
def _convert(ev: Evaluator, node: Any, index: Index) -> Term:
    source = node.args[0]
    if not _exact(source.meta["val"]):
        raise Unmodelled("a conversion from an inexact type")
    term = ev.at(source, index)
    return _boolean(term) if node.meta["val"].dtype == torch.bool else _integer(term)


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
    if not all(_same_size(source.meta["val"].shape[dim], 1) for dim in gone):
        raise Unmodelled("a squeeze of a size that may not be 1")
    rest = iter(index)
    return ev.at(source, tuple(z3.IntVal(0) if dim in gone else next(rest) for dim in range(source.meta["val"].dim())))


@_models(aten.permute.default, aten.transpose.int)
def _permute(ev: Evaluator, node: Any, index: Index) -> Term:
    rank = len(index)
    if node.target is aten.transpose.int:
        order = list(range(rank))
        a, b = (ev.dim(node, dim) for dim in node.args[1:3])
        order[a], order[b] = order[b], order[a]
    else:
        order = [ev.dim(node, dim) for dim in node.args[1]]
    source: list[Any] = [None] * rank
    for position, dim in enumerate(order):
        source[dim] = index[position]
    return ev.at(node.args[0], tuple(source))


@_models(aten.slice.Tensor)
def _slice(ev: Evaluator, node: Any, index: Index) -> Term:
    source, dim, start, _end, step = _arguments(node, 0, None, None, 1)
    dim, start = ev.dim(source, dim), 0 if start is None else start
    if step != 1:
        raise Unmodelled("a slice with a step")
    size, first = ev.shape(source)[dim], ev.size(start)
    # Python's rule: negative starts count from the end, and everything is clamped to the size.
    first = z3.If(first < 0, z3.If(first + size < 0, 0, first + size), z3.If(first > size, size, first))
    return ev.at(source, (*index[:dim], z3.simplify(index[dim] + first), *index[dim + 1 :]))


@_models(aten.select.int)
def _select(ev: Evaluator, node: Any, index: Index) -> Term:
    source, dim, position = node.args
    dim, chosen = ev.dim(source, dim), ev.size(position)
    chosen = z3.If(chosen < 0, chosen + ev.shape(source)[dim], chosen)
    return ev.at(source, (*index[:dim], chosen, *index[dim:]))


@_models(aten.index.Tensor)
def _index(ev: Evaluator, node: Any, index: Index) -> Term:
    source, positions = node.args
    if any(position is None or position.meta["val"].dtype != torch.int64 for position in positions):
        raise Unmodelled("an index with gaps or of another type")
    rank = max(position.meta["val"].dim() for position in positions)
    shape, target = ev.shape(source), node.meta["val"].shape[:rank]
    picked = []
    for dim, position in enumerate(positions):
        where = _integer(ev.at(position, _align(position.meta["val"].shape, target, index[:rank])))
        picked.append(z3.simplify(z3.If(where < 0, where + shape[dim], where)))
    return ev.at(source, (*picked, *index[rank:]))


@_models(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(ev: Evaluator, node: Any, index: Index) -> Term:
    condition, yes, no = (ev.broadcast(operand, node, index) for operand in node.args)
    if node.meta["val"].dtype == torch.bool:
        return z3.If(_boolean(condition), _boolean(yes), _boolean(no))
    return z3.If(_boolean(condition), _integer(yes), _integer(no))


@_models(aten.cat.default)
def _cat(ev: Evaluator, node: Any, index: Index) -> Term:
    parts = node.args[0]
    dim = ev.dim(node, node.args[1] if len(node.args) > 1 else 0)
    kind = (node.meta["val"].dtype, node.meta["val"].dim())
    if not all((part.meta["val"].dtype, part.meta["val"].dim()) == kind for part in parts):
        raise Unmodelled("a concatenation of mixed types, or with torch's empty 1-D tensor")
    position, pieces = index[dim], []
    for part in parts:
        pieces.append((position, ev.shape(part)[dim], part))
        position = position - pieces[-1][1]
    result = ev.at(pieces[-1][2], (*index[:dim], pieces[-1][0], *index[dim + 1 :]))
    for where, size, part in reversed(pieces[:-1]):
        result = z3.If(where < size, ev.at(part, (*index[:dim], where, *index[dim + 1 :])), result)
    return result


@_models(aten.diff.default)
def _diff(ev: Evaluator, node: Any, index: Index) -> Term:
    """First difference with an optional prepended slice of length 1."""
    source, order, dim, prepend, append = _arguments(node, 1, -1, None, None)
    if order != 1 or append is not None or source.meta["val"].dtype != torch.int64:
        raise Unmodelled("a difference of another order")
    dim = ev.dim(source, dim)

    def element(position: z3.ArithRef) -> Term:
        return ev.at(source, (*index[:dim], position, *index[dim + 1 :]))

    here = index[dim]
    if prepend is None:
        return element(here + 1) - element(here)
    if not _same_size(prepend.meta["val"].shape[dim], 1):
        raise Unmodelled("more than one prepended element")
    before = ev.at(prepend, (*index[:dim], z3.IntVal(0), *index[dim + 1 :]))
    return z3.If(here == 0, element(here) - before, element(here) - element(here - 1))


@_models(aten.cumsum.default)
def _cumsum(ev: Evaluator, node: Any, index: Index) -> Term:
    """Modelled where the operand is provably one constant on the whole row: then it is that many times it."""
    source, dim = node.args[0], ev.dim(node, node.args[1])
    step = z3.FreshInt("step")
    summand = _integer(ev.at(source, (*index[:dim], step, *index[dim + 1 :])))
    inside = [z3.And(step >= 0, step < ev.shape(source)[dim])]
    for constant in (0, 1):
        if ev.proves(summand == constant, *inside, *in_range(ev, node, index)):
            return constant * (index[dim] + 1)
    raise Unmodelled("a sum of varying terms")


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


def in_range(ev: Evaluator, node: Any, index: Index) -> list[z3.BoolRef]:
    """``0 <= index < size`` for every dimension of ``node``."""
    return [z3.And(item >= 0, item < size) for item, size in zip(index, ev.shape(node), strict=True)]
