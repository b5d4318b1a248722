"""Every operation model against PyTorch, on random arguments of all types.

An element that a model gives must be the one that PyTorch gives; one that it does not give (an unknown function of
its place) is always right, so each test also counts those that it gives.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
import z3
from hypothesis import HealthCheck, given, settings
from operation_cases import CASES, FLOATS, INTEGERS, TYPES, Case, Made, Size, cases
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate

from passes.proof import terms
from passes.proof.operations import MODELS
from passes.proof.symbolic import Evaluator

aten = torch.ops.aten

NAN = z3.RealVal(3**800)
"""Stands for a NaN among the contents of an input, of which a model may know nothing."""
REFUSED = (RuntimeError, IndexError, ValueError, TypeError, OverflowError)
"""What PyTorch raises where it refuses arguments."""


def number(element: Tensor) -> z3.ExprRef:
    value = element.item()
    if element.dtype == torch.bool:
        return z3.BoolVal(value)
    if element.dtype in INTEGERS:
        return z3.IntVal(value)
    if value != value:
        return NAN
    if abs(value) == float("inf"):
        return z3.RealVal(terms.INFINITY if value > 0 else -terms.INFINITY)
    return z3.RealVal(str(Fraction(value)))


def places(shape: torch.Size) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


class Application:
    """The graph of one application.  The contents of an input are known to the models, or not."""

    def __init__(self, target: Any, case: Case) -> None:
        self.graph, self.contents, self.evaluator = Graph(), {}, Evaluator({}, given={})
        self._hidden = itertools.cycle(case.hidden)
        args, kwargs = self._nodes(case.args), self._nodes(case.kwargs)
        self.node = self.graph.call_function(target, args, kwargs)
        real_args, real_kwargs = plain(case.args), plain(case.kwargs)
        self.result: Tensor | None = None
        try:
            self.result = target(*real_args, **real_kwargs)
            self.node.meta["val"] = self.result
        except REFUSED:
            # PyTorch says so when it runs, not always when it traces: a graph may hold such an application.
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                fakes = map_aggregate(
                    (real_args, real_kwargs), lambda each: mode.from_tensor(each) if isinstance(each, Tensor) else each
                )
                self.node.meta["val"] = target(*fakes[0], **fakes[1])

    def _nodes(self, value: Any) -> Any:
        if isinstance(value, Made):
            node = self.graph.call_function(value.target, self._nodes(value.args))
            node.meta["val"] = plain(value)
            return node
        if isinstance(value, tuple | list):
            return type(value)(map(self._nodes, value))
        if isinstance(value, dict):
            return {name: self._nodes(item) for name, item in value.items()}
        if not isinstance(value, Tensor | Size):
            return value
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        node.meta["val"] = value if isinstance(value, Tensor) else int(value)
        if isinstance(value, Tensor):
            self.contents[node.name] = value
            if not next(self._hidden):
                self.evaluator.given[node.name] = lambda index: known(value, index)
        return node

    def element(self, term: z3.ExprRef) -> z3.ExprRef:
        """``term`` with the elements of the inputs put in."""
        while True:
            term = z3.simplify(term)
            reads = [
                (application, number(self.contents[name][place]))
                for name, application in self.evaluator.applications(term)
                if name in self.contents and (place := constant(application.children())) is not None
            ]
            if not reads:
                return term
            term = z3.substitute(term, *reads)


def constant(index: list[z3.ExprRef]) -> tuple[int, ...] | None:
    return tuple(at.as_long() for at in index) if all(map(z3.is_int_value, index)) else None


def plain(value: Any) -> Any:
    """``value`` as PyTorch takes it."""
    if isinstance(value, Made):
        return value.target(*plain(value.args))
    if isinstance(value, tuple | list):
        return type(value)(map(plain, value))
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return int(value) if isinstance(value, Size) else value


def known(tensor: Tensor, index: tuple[Any, ...]) -> z3.ExprRef:
    """The element of ``tensor`` at ``index``, as a choice among numbers."""
    if not tensor.numel() or bool(tensor.isnan().any()):
        raise terms.Unmodelled("not a number")
    place = constant(list(index))
    if place is not None:
        if any(not 0 <= at < size for at, size in zip(place, tensor.shape, strict=True)):
            raise terms.Unmodelled("no such element")
        return number(tensor[place])
    result = number(tensor.flatten()[-1])
    for place in places(tensor.shape):
        at = z3.And([item == here for item, here in zip(index, place, strict=True)])
        result = z3.If(at, number(tensor[place]), result)
    return z3.simplify(result)


def compare(target: Any, case: Case) -> tuple[int, int]:
    """How many elements the model gives, and of how many.  Fails where one of them is not PyTorch's."""
    try:
        application = Application(target, case)
    except REFUSED:
        return 0, 0  # PyTorch does not even trace it
    node, result, evaluator = application.node, application.result, application.evaluator
    shape = node.meta["val"].shape
    letters = z3.Ints("i j k l m")[: len(shape)]
    if case.by_letter or result is None:
        whole = evaluator.at(node, tuple(letters))
    if result is None:
        return 0, 0
    modelled = 0
    few = list(itertools.islice(places(shape), 12))
    few = few if len(few) < 12 else [*few, tuple(size - 1 for size in shape)]
    for place in few:
        index = tuple(map(z3.IntVal, place))
        # Of a letter: the term must hold of every place.
        term = z3.substitute(whole, *zip(letters, index, strict=True)) if case.by_letter else evaluator.at(node, index)
        element = application.element(term)
        if reads_itself(evaluator, element, node):
            continue
        wanted = number(result[place])
        assert element.sort() == wanted.sort() and z3.is_true(z3.simplify(element == wanted)), (
            f"{target}{case} at {place}: the model says {element}, PyTorch {result[place]}"
        )
        modelled += 1
    return modelled, len(few)


def reads_itself(evaluator: Evaluator, element: z3.ExprRef, node: Node) -> bool:
    """Whether the model gave no answer, but an unknown."""
    operations = {made.name for made in node.graph.nodes if made.op == "call_function"}
    return bool(evaluator.reads(element) & operations)


EVERY = sorted(MODELS, key=str)
EXAMPLES = 200
"""For each operation and type, in the nightly run."""
SETTINGS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}

FRACTIONS_BY_TENSORS = (
    aten.floor_divide.default, aten.remainder.Tensor, aten.div.Tensor_mode, aten.div.Scalar_mode,
)  # fmt: skip
WITHOUT: dict[Any, tuple[torch.dtype, ...]] = {
    **dict.fromkeys(
        (target for target in EVERY if "bitwise" in str(target) or ".__" in str(target)), (*INTEGERS, *FLOATS)
    ),
    **dict.fromkeys(FRACTIONS_BY_TENSORS, FLOATS),
    **dict.fromkeys((aten.any.dim, aten.all.dim), (*INTEGERS, *FLOATS)),
    operator.getitem: (torch.bool, *FLOATS),
    aten.cumsum.default: FLOATS,
    aten.diff.default: (torch.bool, *FLOATS),
    **dict.fromkeys((aten.abs.default, aten.neg.default, aten.relu.default), (torch.bool,)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Tensor, aten.rsub.Scalar), (torch.bool,)),
}
"""The types of a first tensor that PyTorch refuses, or for which an operation has no model: bits of integers, fractions
that are divided by what may be 0 or cut to a whole number, truths that are numbers, sums and running maxima of
fractions."""


def modelled(target: Any) -> list[torch.dtype]:
    return [dtype for dtype in TYPES if dtype not in WITHOUT.get(target, ())]


class Counts:
    """What came of the examples of one operation."""

    def __init__(self) -> None:
        self.elements = self.modelled = 0

    def of(self, target: Any, case: Case) -> None:
        modelled, elements = compare(target, case)
        self.elements, self.modelled = self.elements + elements, self.modelled + modelled


@pytest.mark.parametrize("target", EVERY, ids=str)
def test_an_operation_model_gives_what_pytorch_gives(target: Any) -> None:
    counts = Counts()

    @settings(max_examples=18, derandomize=True, **SETTINGS)
    @given(cases(target, [*TYPES, *modelled(target) * 16]))
    def check(case: Case) -> None:
        counts.of(target, case)

    check()
    assert counts.modelled >= max(1, counts.elements // 50), "compares next to nothing"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("target", EVERY, ids=str)
def test_an_operation_model_gives_what_pytorch_gives_for_random_seeds(target: Any, dtype: torch.dtype) -> None:
    """Each night others; a failure prints its arguments, and how to run them again."""
    counts = Counts()

    @settings(max_examples=EXAMPLES, print_blob=True, **SETTINGS)
    @given(cases(target, [dtype]))
    def check(case: Case) -> None:
        counts.of(target, case)

    check()
    if dtype in modelled(target):
        assert counts.modelled >= max(1, counts.elements // 100), "compares next to nothing"


def test_every_operation_model_has_random_arguments() -> None:
    assert set(CASES) == set(MODELS)
