"""A small model of a satisfiable claim about one element of a mask, read back as sizes and tensors."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import z3
from torch import Tensor

from passes.proof.mask_program import MaskProgram
from passes.proof.symbolic import Evaluator
from passes.proof.terms import Term

ATTEMPT_MS = 250
"""Limit of one question to the solver; the smallest-first search goes on with what it has."""


@dataclass(frozen=True)
class Model:
    """Sizes, and contents of the run-time inputs, for which the claim holds if every operation has a model."""

    sizes: dict[str, int]
    inputs: dict[str, Tensor]


def smallest_model(
    program: MaskProgram,
    evaluator: Evaluator,
    claim: Term,
    position: Sequence[Term],
    inside: Sequence[Term],
    most_elements: int,
    seconds: float,
) -> Model | bool:
    """The sizes of least sum, then the least query, key, batch and head, for which ``claim`` can hold.

    Inputs that are not negative are preferred to smaller sizes.

    False: it holds nowhere.  True: it may hold, but no model was found in time, or one whose inputs have more than
    ``most_elements`` elements.
    """
    search = _Search(evaluator, seconds)
    symbols = {name: z3.Int(name) for name in program.symbols}
    for name, (low, high) in program.ranges(evaluator.ranges).items():
        search.solver.add(symbols[name] >= low, symbols[name] <= high)
    search.solver.add(*inside, claim)
    first = search.check()
    if first != z3.sat:
        return bool(first != z3.unsat)
    read = [(name, term) for name, term in evaluator.applications(claim) if name in program.inputs]
    integers = [term for _, term in read if z3.is_int(term)]
    search.prefer(*(term >= 0 for term in integers))
    batch, head, query, key = position
    total = z3.Sum(*symbols.values()) if symbols else z3.IntVal(0)
    for objective in (total, query, key, batch, head):
        search.minimize(objective)
    # Zeros and ones if possible, or else values about as large as positions are.
    if not search.prefer(*(term <= 1 for term in integers)):
        search.prefer(*(term <= search.value(total) for term in integers))
    sizes = {name: search.value(symbol) for name, symbol in symbols.items()}
    shapes = {name: program.shape(name, sizes) for name in program.inputs}
    if sum(torch.Size(shape).numel() for shape in shapes.values()) > most_elements:
        return True
    return Model(
        sizes,
        {
            name: _content(search.model, [term for of, term in read if of == name], shape, program.inputs[name].dtype)
            for name, shape in shapes.items()
        },
    )


class _Search:
    """A solver with a deadline that keeps the last model it found."""

    def __init__(self, evaluator: Evaluator, seconds: float) -> None:
        self.solver = evaluator.solver()
        self.deadline = time.perf_counter() + seconds
        self.model: z3.ModelRef | None = None

    def check(self, *assumptions: Term) -> Any:
        left = int((self.deadline - time.perf_counter()) * 1000)
        if left <= 0:
            return z3.unknown
        self.solver.push()
        try:
            self.solver.set("timeout", min(left, ATTEMPT_MS))
            self.solver.add(*assumptions)
            result = self.solver.check()
            if result == z3.sat:
                self.model = self.solver.model()
            return result
        finally:
            self.solver.pop()

    def prefer(self, *wishes: Term) -> bool:
        """Hold ``wishes`` where they can hold."""
        if self.check(*wishes) != z3.sat:
            return False
        self.solver.add(*wishes)
        return True

    def value(self, term: Term) -> int:
        assert self.model is not None
        return int(self.model.eval(term, model_completion=True).as_long())

    def minimize(self, objective: Term) -> None:
        """Hold ``objective``, which is not negative, at the least value found: probes 0, 2, 6, 14, ... from below.

        z3's own optimizer ignores its time limit now and then, and most minima are small.
        """
        low, high, span = 0, self.value(objective), 1
        while low < high:
            probe = min(low + span - 1, high - 1)
            result = self.check(objective <= probe)
            if result == z3.sat:
                high = self.value(objective)
                span = max(1, (high - low) // 2)
            elif result == z3.unsat:
                low, span = probe + 1, span * 2
            else:
                break
        self.solver.add(objective <= high)


def _content(model: Any, applications: Sequence[Term], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that the model gives an input; where it says nothing, zeros."""
    tensor = torch.zeros(shape, dtype=dtype)
    for application in applications:
        at = [model.eval(argument, model_completion=True) for argument in application.children()]
        value = model.eval(application, model_completion=True)
        if all(z3.is_int_value(i) and 0 <= i.as_long() < size for i, size in zip(at, shape, strict=True)):
            index = tuple(i.as_long() for i in at)
            tensor[index] = _fitting(value.as_long(), dtype) if z3.is_int_value(value) else z3.is_true(value)
    return tensor


def _fitting(value: int, dtype: torch.dtype) -> int:
    """``value`` within the type; a model that needs another value is not confirmed then."""
    if dtype.is_floating_point or dtype == torch.bool:
        return value
    limits = torch.iinfo(dtype)
    return max(limits.min, min(limits.max, value))


def possible_sizes(evaluator: Evaluator, candidates: Iterable[dict[str, int]]) -> Iterator[dict[str, int]]:
    """Those of ``candidates`` that keep the evaluator's premises on sizes."""
    solver = evaluator.solver()
    solver.set("timeout", ATTEMPT_MS)
    for sizes in candidates:
        if solver.check(*(z3.Int(name) == value for name, value in sizes.items())) == z3.sat:
            yield sizes
