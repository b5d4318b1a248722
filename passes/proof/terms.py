"""Terms: what z3 is given for the numbers of a graph, and the little that models and evaluator both need of them.

Integers are z3 integers, booleans z3 booleans.  A floating-point number is an exact z3 real, with one real far
outside every type for each infinity; it is only ever a leaf of a tree of choices (``If``), and
:func:`leaf_by_leaf` puts each leaf through PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy
import torch
import z3
from torch.fx import Node

if TYPE_CHECKING:
    from passes.proof.symbolic import Evaluator

Term: TypeAlias = Any
"""A z3 expression; z3 ships no types."""
Index: TypeAlias = tuple[Any, ...]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
INFINITY = 2**1100  # beyond float64's largest number, 2**1024
LEAVES = 256


class Unmodelled(Exception):
    """This element has no model; it becomes an uninterpreted function."""


def is_tensor(argument: Any) -> bool:
    return isinstance(argument, Node) and isinstance(argument.meta.get("val"), torch.Tensor)


def dtype_of(node: Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def size_expression(size: Any) -> sympy.Expr:
    """A size as an expression; unlike ``==`` on a SymInt this never asks, or installs, a shape guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def same_size(a: Any, b: Any) -> bool:
    return bool(size_expression(a) == size_expression(b))


def in_range(ev: Evaluator, node: Node, index: Index) -> list[z3.BoolRef]:
    """``0 <= index < size`` for every dimension of ``node``."""
    return [z3.And(item >= 0, item < size) for item, size in zip(index, ev.shape(node), strict=True)]


def integer(term: Term) -> z3.ArithRef:
    if z3.is_real(term):
        raise Unmodelled("a fraction among integers")
    return z3.If(term, z3.IntVal(1), z3.IntVal(0)) if z3.is_bool(term) else term


def fits(term: z3.ArithRef, dtype: torch.dtype) -> z3.BoolRef:
    """Whether the integer ``term`` lies within the integer type ``dtype``."""
    limits = torch.iinfo(dtype)
    return z3.And(term >= limits.min, term <= limits.max)


def boolean(term: Term) -> z3.BoolRef:
    if z3.is_real(term):
        raise Unmodelled("a fraction among booleans")
    return term if z3.is_bool(term) else term != 0


def literal(value: bool | int | float, dtype: torch.dtype) -> Term:
    """The term of the scalar ``value`` stored as ``dtype``, rounded as PyTorch does.

    The one place where a scalar meets a type.  What does not fit raises :class:`Unmodelled`: an operation of torch's
    raises an error for it, or wraps, or cuts the fraction off, each in its own way, and other backends in theirs.
    """
    if value != value:
        raise Unmodelled("not a number")
    if dtype == torch.bool:
        return z3.BoolVal(bool(value))
    if dtype in INTEGERS:
        limits = torch.iinfo(dtype)
        if not limits.min <= value <= limits.max or value != int(value):
            raise Unmodelled(f"{value} is no {dtype}")
        return z3.IntVal(int(value))
    if dtype not in FLOATS:
        raise Unmodelled(f"numbers of {dtype}")
    if value in (float("inf"), float("-inf")):
        return z3.RealVal(INFINITY if value > 0 else -INFINITY)
    if abs(value) > (torch.iinfo(torch.int64) if isinstance(value, int) else torch.finfo(dtype)).max:
        raise Unmodelled(f"{value} is beyond {dtype}")
    rounded = torch.tensor(value, dtype=dtype).item()
    if abs(rounded) == float("inf"):
        raise Unmodelled(f"{value} is beyond {dtype}")
    return z3.RealVal(str(Fraction(rounded)))


def value_of(leaf: Term) -> bool | int | float:
    """The number that ``leaf`` is; raises :class:`Unmodelled` where it is not one number."""
    leaf = z3.simplify(leaf)
    if z3.is_true(leaf) or z3.is_false(leaf):
        return bool(z3.is_true(leaf))
    if z3.is_int_value(leaf):
        return int(leaf.as_long())
    if z3.is_rational_value(leaf):
        fraction = leaf.as_fraction()
        if abs(fraction) == INFINITY:
            return float("inf") if fraction > 0 else float("-inf")
        return float(fraction)
    raise Unmodelled("an unknown number")


def leaf_by_leaf(function: Callable[..., Term], *terms: Term) -> Term:
    """``function`` of every combination of the numbers that ``terms`` can be, under the choices that lead to them."""
    leaves = 0
    results: list[Term] = []
    pending: list[Any] = [terms]  # operands still to be told apart, or a condition whose two results are there
    while pending:
        operands = pending.pop()
        if not isinstance(operands, tuple):
            no, yes = results.pop(), results.pop()
            results.append(z3.If(operands, yes, no))
            continue
        for place, term in enumerate(operands):
            choice = _choice(term)
            if choice is not None:
                condition, yes, no = choice
                before, after = operands[:place], operands[place + 1 :]
                pending += [condition, (*before, no, *after), (*before, yes, *after)]
                break
        else:
            leaves += 1
            if leaves > LEAVES:
                raise Unmodelled("too many cases")
            results.append(function(*operands))
    return results.pop()


def _choice(term: Term) -> tuple[Term, Term, Term] | None:
    """The condition and the two terms between which ``term`` chooses; None where it does not."""
    if z3.is_app_of(term, z3.Z3_OP_ITE):
        condition, yes, no = term.children()
        return condition, yes, no
    if z3.is_bool(term) and not (z3.is_true(term) or z3.is_false(term)):
        return term, z3.BoolVal(True), z3.BoolVal(False)
    return None


def product(left: z3.ArithRef, right: z3.ArithRef) -> Term:
    if not (z3.is_int_value(z3.simplify(left)) or z3.is_int_value(z3.simplify(right))):
        raise Unmodelled("a product of two unknowns")
    return left * right


def positive(term: Term) -> int:
    """The positive number that ``term`` is, to divide by; z3 then rounds down and leaves remainders from 0 on."""
    divisor = z3.simplify(term)
    if not z3.is_int_value(divisor) or divisor.as_long() <= 0:
        raise Unmodelled("a divisor that is not a positive number")
    return int(divisor.as_long())
