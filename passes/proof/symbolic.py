"""The value of a graph's tensors at one symbolic position, as SMT terms.

``Evaluator.at(node, index)`` is the element ``node[index]`` where ``index`` holds integer terms: integers
of the graph become unbounded integers, booleans become booleans, and sizes become terms over the shape
symbols of ``torch.export``.  An operation without a model becomes an uninterpreted function of its index,
and so does a run-time input: neither can help a proof, so what is proved is true whatever they hold.

What keeps "unbounded" honest: arithmetic on integers is given up unless it provably stays within their type.
Floating-point numbers are never calculated with in the solver: where an element can only be one of a few numbers,
each is put through PyTorch's own operation.  Out-of-range indices are an error in PyTorch, so an element that is
read is one that exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import z3
from torch.fx import Node

from passes.proof.constants import constant_element
from passes.proof.operations import MODELS, MOVES
from passes.proof.sizes import INT64_MAX, is_size
from passes.proof.terms import (
    FLOATS,
    INTEGERS,
    Index,
    Term,
    Unmodelled,
    dtype_of,
    fits,
    in_range,
    is_tensor,
    same_size,
)

SOLVER_STEPS = 10_000_000
"""z3's own count of what a claim may cost (``rlimit``), not seconds: the same claim then has the same answer on every
machine, however busy.  All claims about one mask of Hugging Face's take 16,000 (Llama's) to 82,000 (packed positions)
together."""
DEEPEST = 100
"""Operations behind each other that are looked through, at some seven calls each; Python allows 1000 calls."""
MOST_ELEMENTS = 20_000
"""Elements that one evaluator looks at: operations that read an operand at two places double them at each step."""
MOST_PROOFS = 500
"""Questions to the solver about one mask; none of the suite's asks 30.  Operations that are settled by a proof about a
whole row ask several at each of their elements, which takes hours where they stand behind each other."""


class Evaluator:
    """Terms for the elements of one functional graph (after ``ExportedProgram.run_decompositions({})``).

    ``ranges`` maps the shape symbols' names to their inclusive bounds.  ``opaque`` names nodes that are
    not looked into (used to ask how one tensor is made of another).  ``given`` are inputs whose elements are
    known, or assumed: placeholder name -> the element at an index.  ``bounded``: 64-bit integers that come as input
    are assumed to stay within half their range, so that a sum of two does not overflow.
    """

    def __init__(
        self,
        ranges: dict[str, tuple[int, int]],
        constants: dict[str, torch.Tensor] | None = None,
        opaque: frozenset[Node] = frozenset(),
        given: dict[str, Callable[[Index], Term]] | None = None,
        bounded: bool = False,
    ) -> None:
        self.ranges = ranges
        self.constants = constants or {}
        self.opaque = opaque
        self.given = given or {}
        self.bounded = bounded
        self.premises: list[z3.BoolRef] = []
        self.inputs: dict[str, str] = {}
        """Name of each uninterpreted function -> the placeholder or operation that it stands for."""
        self._symbols: dict[str, z3.ArithRef] = {}
        self._unknown_sizes: dict[str, z3.ArithRef] = {}
        self._known: dict[tuple[Node, tuple[int, ...]], tuple[Index, Term]] = {}
        self._depth = 0
        self._proofs = 0

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
            low, high = self.ranges.get(name, (0 if is_size(name) else -INT64_MAX, INT64_MAX))
            self.premises += [symbol >= low, symbol <= high]
            self._symbols[name] = symbol
        return self._symbols[name]

    # -- the solver ----------------------------------------------------------------------------------

    def solver(self) -> z3.Solver:
        solver = z3.Solver()
        solver.set("rlimit", SOLVER_STEPS)
        solver.set("ctrl_c", False)  # z3 would answer "unknown" and the run go on without a proof
        solver.add(self.premises)
        return solver

    def proves(self, claim: z3.BoolRef, *assumptions: z3.BoolRef) -> bool:
        """Whether ``claim`` follows; running out of steps is a no.  Contradictory assumptions prove nothing here.

        Raises :class:`Unmodelled` after :data:`MOST_PROOFS` claims.
        """
        self._proofs += 1
        if self._proofs > MOST_PROOFS:
            raise Unmodelled("too many questions to the solver")
        solver = self.solver()
        solver.add(*assumptions)
        if solver.check() != z3.sat:
            return False
        solver.add(z3.Not(claim))
        return bool(solver.check() == z3.unsat)

    # -- elements ------------------------------------------------------------------------------------

    def at(self, node: Any, index: Index) -> Term:
        """The element of ``node`` at ``index``: a term.  Whole numbers stand for themselves."""
        if isinstance(node, bool):
            return z3.BoolVal(node)
        if isinstance(node, int):
            return z3.IntVal(node)
        if not isinstance(node, Node):
            raise Unmodelled(f"{node!r}")
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | int):
            return self.size(node)
        if isinstance(value, torch.Tensor) and value.dim() != len(index):
            raise Unmodelled(f"{len(index)} indices into {value.dim()} dimensions")
        key = (node, tuple(item.get_id() for item in index))
        if key not in self._known:  # the index is kept with it: z3 gives the ids of terms that are gone again
            self._depth += 1
            try:
                self._known[key] = (index, self._element(node, index))
            finally:
                self._depth -= 1
        return self._known[key][1]

    def _element(self, node: Node, index: Index) -> Term:
        value = node.meta.get("val")
        model = MODELS.get(node.target) if node.op == "call_function" and node not in self.opaque else None
        modelled = isinstance(value, torch.Tensor) and value.dtype in (torch.bool, *INTEGERS, *FLOATS)
        try:
            if self._depth > DEEPEST or len(self._known) > MOST_ELEMENTS:
                raise Unmodelled("too deep, or too much")
            if model is not None and (modelled or node.target in MOVES):
                term = model(self, node, index)
                return term if node.target in MOVES else self._bounded(term, node, index)
            if node.name in self.given:
                return self.given[node.name](index)
            if node.name in self.constants and modelled:
                return constant_element(self.constants[node.name], index)
        except Unmodelled:
            pass
        return self._uninterpreted(node, index)

    def _uninterpreted(self, node: Node, index: Index) -> Term:
        value = node.meta.get("val")
        sort = z3.RealSort()  # of a fraction nothing is known, not even that it is a number
        if isinstance(value, torch.Tensor) and value.dtype in (torch.bool, *INTEGERS):
            sort = z3.BoolSort() if value.dtype == torch.bool else z3.IntSort()
        name = f"{node.name}[]"
        self.inputs[name] = node.name
        function = z3.Function(name, *[z3.IntSort()] * len(index), sort)
        element = function(*index)
        if z3.is_int(element) and isinstance(value, torch.Tensor):
            limits, part = torch.iinfo(value.dtype), 2 if self.bounded and node.op == "placeholder" else 1
            self.premises.append(z3.And(element >= -(-limits.min // part), element <= limits.max // part))
        return element

    def _bounded(self, term: Term, node: Node, index: Index) -> Term:
        """``term``, the element ``node[index]``, if it cannot leave its type where that element exists.

        A term without operator (a number, an index, an element of an input) is not computed and cannot.
        """
        dtype = dtype_of(node)
        if (z3.is_bool(term), z3.is_real(term)) != (dtype == torch.bool, dtype in FLOATS):
            raise Unmodelled(f"a term of another sort than {dtype}")
        computed = z3.is_int(term) and term.decl().kind() != z3.Z3_OP_UNINTERPRETED and not z3.is_int_value(term)
        if computed and not self.proves(fits(term, dtype), *in_range(self, node, index)):
            raise Unmodelled(f"may overflow {dtype}")
        return term

    def applications(self, term: Term) -> list[tuple[str, Term]]:
        """The elements of placeholders, and of operations without a model, that ``term`` is made of, by their names."""
        found, pending, seen = [], [term], set()
        while pending:
            current = pending.pop()
            if current.get_id() in seen:
                continue
            seen.add(current.get_id())
            if z3.is_app(current):
                if current.decl().name() in self.inputs:
                    found.append((self.inputs[current.decl().name()], current))
                pending.extend(current.children())
        return found

    def reads(self, term: Term) -> set[str]:
        """Names of the placeholders and operations whose values ``term`` hangs on."""
        return {name for name, _ in self.applications(term)}

    # -- helpers of the models -----------------------------------------------------------------------

    def broadcast(self, operand: Any, node: Node, index: Index) -> Term:
        """The element of ``operand`` that meets ``index`` of ``node`` under broadcasting."""
        if not is_tensor(operand):
            return self.at(operand, ())
        return self.at(operand, self.align(operand.meta["val"].shape, node.meta["val"].shape, index))

    def align(self, shape: Sequence[Any], target: Sequence[Any], index: Index) -> Index:
        """The index into ``shape`` that meets ``index`` into ``target`` under broadcasting: 0 where a size is 1.

        A size that is 1 at some lengths of the profile only is told apart there; one that is not proved to be 1 or
        the size that it meets, at every length, has no model.
        """
        tail = index[len(index) - len(shape) :]
        result = []
        for extent, wanted, position in zip(shape, target[len(target) - len(shape) :], tail, strict=True):
            if same_size(extent, wanted) and not same_size(extent, 1):
                result.append(position)
                continue
            size = self.size(extent)
            if not same_size(extent, 1) and not self.proves(z3.Or(size == 1, size == self.size(wanted))):
                raise Unmodelled("a size that may or may not broadcast")
            result.append(z3.simplify(z3.If(size == 1, z3.IntVal(0), position)))
        return tuple(result)

    def dim(self, node: Node, dim: int) -> int:
        rank = node.meta["val"].dim()
        if not -rank <= dim < rank:  # torch allows 0 and -1 of a number, and any of an empty tensor in a cat
            raise Unmodelled(f"dimension {dim} of {rank}")
        return dim + rank if dim < 0 else dim
