"""Every operation model against PyTorch, element by element, and what must not be provable."""

from __future__ import annotations

import functools
import itertools
import operator
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import z3
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.nn.functional import pad

from passes.proof import terms
from passes.proof.calls import find_calls
from passes.proof.masks import Prover
from passes.proof.operations import MODELS
from passes.proof.sizes import INT64_MAX, symbol_ranges
from passes.proof.symbolic import Evaluator
from passes.proof.terms import in_range

aten = torch.ops.aten


def ints(*shape: int) -> Tensor:
    """Distinct values of both signs, 0 among them."""
    return (torch.arange(torch.Size(shape).numel()) * 3 - 6).reshape(shape)


def bools(*shape: int) -> Tensor:
    return ints(*shape) % 2 == 0


def positions(*values: Any) -> Tensor:
    return torch.tensor(values)


LEAST = torch.finfo(torch.float32).min


def floats() -> Tensor:
    return torch.tensor([0.0, 1.0, -1.0, 0.1, -torch.inf, LEAST])


# (operation, arguments, keyword arguments)
CASES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.add.Tensor, (ints(2, 3), ints(3)), {}),
    (aten.add.Tensor, (ints(2, 1, 3), ints(4, 1)), {"alpha": -2}),
    (aten.add.Tensor, (ints(2, 3), bools(2, 3)), {}),
    (aten.add.Tensor, (ints(3), 4), {}),
    (aten.add.Scalar, (ints(3), 5, 2), {}),
    (aten.sub.Tensor, (ints(2, 3), ints(2, 1)), {"alpha": 3}),
    (aten.sub.Scalar, (ints(3), 5), {}),
    (aten.mul.Tensor, (ints(2, 3), -4), {}),
    (aten.mul.Scalar, (ints(2, 3), 3), {}),
    *((getattr(aten, name).Tensor, (ints(2, 1, 3), ints(4, 1)), {}) for name in ("le", "lt", "ge", "gt")),
    *((getattr(aten, name).Tensor, (ints(2, 3), ints(3)), {}) for name in ("eq", "ne")),
    *((getattr(aten, n).Scalar, (ints(5), 0), {}) for n in ("le", "lt", "ge", "gt", "eq", "ne")),
    (aten.eq.Tensor, (bools(2, 3), ints(3)), {}),
    *((op, (bools(2, 3), bools(3).logical_not()), {}) for op in (aten.__and__.Tensor, aten.bitwise_and.Tensor)),
    *((op, (bools(2, 3), bools(3).logical_not()), {}) for op in (aten.__or__.Tensor, aten.bitwise_or.Tensor)),
    (aten.logical_and.default, (ints(2, 3), bools(2, 1)), {}),
    (aten.logical_or.default, (ints(2, 3), ints(3)), {}),
    (aten.bitwise_not.default, (bools(4),), {}),
    (aten.logical_not.default, (ints(4),), {}),
    (aten.arange.default, (5,), {}),
    (aten.arange.start, (-3, 4), {}),
    (aten.arange.start_step, (1, 11, 3), {}),
    (aten.arange.start_step, (10, -5, -4), {}),
    (aten.full.default, ([2, 3], -7), {}),
    (aten.full.default, ([2], True), {}),
    (aten.new_full.default, (ints(2), [3, 2], 4), {}),
    (aten.new_full.default, (ints(2), [3], False), {"dtype": torch.bool}),
    (aten.new_ones.default, (ints(2), [3]), {}),
    (aten.ones.default, ([2, 2],), {"dtype": torch.int64}),
    (aten.ones_like.default, (bools(3),), {}),
    (aten.new_zeros.default, (ints(2), [3]), {"dtype": torch.bool}),
    (aten.zeros.default, ([2],), {"dtype": torch.int64}),
    (aten.zeros_like.default, (ints(3),), {}),
    *((op, (ints(2, 3),), {}) for op in (aten.clone.default, aten.alias.default, aten.detach.default)),
    (aten.lift_fresh_copy.default, (ints(3),), {}),
    (aten._to_copy.default, (ints(5),), {"dtype": torch.bool}),
    (aten._to_copy.default, (bools(5),), {"dtype": torch.int64}),
    (aten.expand.default, (ints(1, 3), [4, 3]), {}),
    (aten.expand.default, (ints(3, 1), [2, -1, 5]), {}),
    *((aten.unsqueeze.default, (ints(2, 3), dim), {}) for dim in range(-3, 3)),
    *((aten.squeeze.dim, (ints(1, 3, 1), dim), {}) for dim in (0, -1)),
    (aten.squeeze.dims, (ints(1, 3, 1, 2), [0, -2]), {}),
    (aten.permute.default, (ints(2, 3, 4), [2, 0, -2]), {}),
    *((aten.transpose.int, (ints(2, 3, 4), a, b), {}) for a, b in ((0, 1), (-1, -3), (1, 1))),
    *((aten.slice.Tensor, (ints(2, 5), -1, start), {}) for start in (-7, -5, -2, 0, 3, 4)),
    *((aten.slice.Tensor, (ints(5, 2), 0, a, b), {}) for a, b in ((1, -1), (-4, 99), (0, INT64_MAX), (-9, 2))),
    (aten.slice.Tensor, (ints(5),), {}),
    *((aten.select.int, (ints(3, 4), dim, at), {}) for dim, at in ((0, 2), (1, -1), (-1, 0), (-2, -3))),
    (aten.index.Tensor, (ints(5), [positions(4, -1, 0, -5)]), {}),
    (aten.index.Tensor, (ints(3, 4), [positions([0], [-1]), positions(3, 0, -2)]), {}),
    (aten.index.Tensor, (ints(3, 4, 2), [positions(2, 0), positions(1, -1)]), {}),
    (aten.index.Tensor, (ints(3, 4), [positions([2, 0], [1, 1])]), {}),
    (aten.where.self, (bools(2, 3), ints(3), ints(2, 1)), {}),
    (aten.where.self, (bools(3), bools(3), bools(2, 3)), {}),
    (aten.where.ScalarOther, (bools(3), ints(2, 3), -1), {}),
    (aten.where.ScalarSelf, (bools(3), 8, ints(2, 3)), {}),
    (aten.where.Scalar, (bools(3), 8, -1), {}),
    (aten.cat.default, ([ints(2, 3), ints(2, 1), ints(2, 2)], -1), {}),
    (aten.cat.default, ([bools(1, 2), bools(0, 2), bools(2, 2)],), {}),
    (aten.diff.default, (ints(2, 5),), {}),
    (aten.diff.default, (ints(3, 2), 1, 0, ints(1, 2)), {}),
    (aten.diff.default, (ints(2, 4), 1, -1, ints(2, 1)), {}),
    (aten.cumsum.default, (torch.zeros(2, 3, dtype=torch.bool), -1), {}),
    (aten.cumsum.default, (torch.ones(3, 2, dtype=torch.int64), 0), {}),
    *((op, (ints(2, 3), ints(3)), {}) for op in (aten.minimum.default, aten.maximum.default, aten.rsub.Tensor)),
    (aten.rsub.Scalar, (ints(3), 5), {}),
    *((op, (ints(7), 3), {}) for op in (aten.remainder.Scalar, aten.floor_divide.Scalar)),
    *((op, (ints(7), torch.tensor(4)), {}) for op in (aten.remainder.Tensor, aten.floor_divide.default)),
    *((aten.div.Tensor_mode, (ints(7), torch.tensor(4)), {"rounding_mode": mode}) for mode in ("floor", "trunc")),
    *((aten.div.Scalar_mode, (ints(7), 4), {"rounding_mode": mode}) for mode in ("floor", "trunc")),
    *((op, (ints(5),), {}) for op in (aten.neg.default, aten.abs.default)),
    *((aten.clamp.default, (ints(5), *bounds), {}) for bounds in ((-2, 3), (None, 0), (1,))),
    *((op, (ints(5), 1), {}) for op in (aten.clamp_min.default, aten.clamp_max.default)),
    *((op, (bools(3), True), {}) for op in (aten.__and__.Scalar, aten.__or__.Scalar, aten.__xor__.Scalar)),
    *((op, (bools(3), True), {}) for op in (aten.bitwise_and.Scalar, aten.bitwise_or.Scalar, aten.bitwise_xor.Scalar)),
    *((op, (bools(2, 3), bools(2, 1)), {}) for op in (aten.__xor__.Tensor, aten.bitwise_xor.Tensor)),
    (aten.logical_xor.default, (ints(2, 3), bools(3)), {}),
    (aten.full_like.default, (ints(3), 4), {}),
    (aten.full_like.default, (ints(3), LEAST), {"dtype": torch.float32}),
    (aten.scalar_tensor.default, (-torch.inf,), {"dtype": torch.float16}),
    *((aten.full.default, ([2], 0.1), {"dtype": dtype}) for dtype in (torch.float16, torch.bfloat16)),
    (aten._to_copy.default, (ints(5),), {"dtype": torch.int32}),
    (aten._to_copy.default, (bools(5),), {"dtype": torch.float16}),
    *((aten._to_copy.default, (floats(),), {"dtype": t}) for t in (torch.bool, torch.float16, torch.bfloat16)),
    *((op, (floats(), floats()[:, None]), {}) for op in (aten.add.Tensor, aten.maximum.default)),
    (aten.mul.Tensor, (floats()[:4], floats()[:4, None]), {}),
    (aten.add.Tensor, (floats().half(), floats().half()), {"alpha": 2}),
    (aten.rsub.Scalar, (floats(), 1.0), {}),
    (aten.mul.Scalar, (floats(), LEAST), {}),
    (aten.mul.Tensor, (floats()[:4].half(), floats()[3]), {}),
    *((op, (floats(), 4.0), {}) for op in (aten.div.Scalar, aten.div.Tensor)),
    *((op, (floats(),), {}) for op in (aten.exp.default, aten.isinf.default, aten.isnan.default, aten.relu.default)),
    *((op, (floats(), floats()[:, None]), {}) for op in (aten.le.Tensor, aten.eq.Tensor)),
    (aten.lt.Scalar, (floats(), -0.5), {}),
    (aten.logical_not.default, (floats(),), {}),
    (aten.clamp.default, (floats(), -1.0, 0.5), {}),
    (aten.where.self, (bools(3), floats()[:3], torch.tensor(LEAST)), {}),
    (aten.where.ScalarOther, (bools(3), floats()[:3], -torch.inf), {}),
    (aten.masked_fill.Scalar, (floats()[:3], bools(3), LEAST), {}),
    (aten.masked_fill.Tensor, (ints(2, 3), bools(3), positions(9)[0]), {}),
    *((op, (ints(3, 4), d), {}) for op in (aten.tril.default, aten.triu.default) for d in (-1, 0, 2)),
    *((op, (bools(2, 3, 3),), {}) for op in (aten.tril.default, aten.triu.default)),
    (aten.constant_pad_nd.default, (ints(2, 3), [1, 2, 0, 1], -5), {}),
    (aten.constant_pad_nd.default, (ints(2, 3), [-1, 1]), {}),
    (aten.copy.default, (ints(2, 3), bools(3)), {}),
    (aten.t.default, (ints(2, 3),), {}),
    (aten.slice.Tensor, (ints(7), 0, 1, 6, 2), {}),
    *((aten.slice_scatter.default, (ints(5, 2), ints(2, 2) + 50, 0, a, b), {}) for a, b in ((1, 3), (-2, 99))),
    (aten.flip.default, (ints(2, 3), [-1]), {}),
    *((aten.repeat.default, (ints(2, 3), times), {}) for times in ([2, 1], [1, 2], [2, 1, 2])),
    (aten.index.Tensor, (ints(3, 4), [None, positions(1, 2, -1)]), {}),
    (aten.index.Tensor, (ints(2, 3, 4), [None, positions([1], [2]), positions(0, -1)]), {}),
    (aten.index.Tensor, (ints(2, 3, 4), [positions(1, 0), None, positions(0, -1)]), {}),
    (aten.index_select.default, (ints(3, 4), 1, positions(2, 0)), {}),
    (aten.gather.default, (ints(3, 4), 1, positions([2, 0], [1, 1])), {}),
    (aten.stack.default, ([ints(2, 3), ints(2, 3) + 1, ints(2, 3) - 1], 1), {}),
    *((op, (known, 1, keep), {}) for op in (aten.any.dim, aten.all.dim) for keep in (False, True)
      for known in (torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool))),
    (aten.any.dim, (positions(0, 0, 1)[:, None] == positions(0, 1), 1), {}),
    *(
        (op, (ints(*before), list(after)), {})
        for op in (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten._reshape_copy.default)
        for before, after in (
            ((2, 3, 4), (6, 4)), ((2, 3, 4), (2, 12)), ((2, 12), (2, 3, 4)), ((24,), (2, 3, 4)), ((2, 3, 4), (24,)),
            ((4, 6), (8, 3)), ((4, 6), (2, 2, 3, 2)), ((1, 6, 1), (2, 1, 3)), ((2, 3), (1, 2, 3, 1)), ((1,), ()),
        )
    ),
]  # fmt: skip


class OneNode:
    """The graph of one operation on placeholders that hold known tensors, and the terms of its result."""

    def __init__(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.graph, self.premises, self.given = Graph(), [], {}
        self.node = self.graph.call_function(target, torch.fx.node.map_aggregate(args, self._placeholder), kwargs)
        self.real = target(*args, **kwargs)
        self.node.meta["val"] = self.real
        self.evaluator = Evaluator({}, given=self.given)
        self.evaluator.premises += self.premises

    def _placeholder(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        node.meta["val"] = value
        if value.is_floating_point() or not value.dim():  # calculated with number by number, or a divisor
            self.given[node.name] = lambda index: chosen(value, index)
            return node
        for where in indices(value):
            self.premises.append(Evaluator({}).at(node, numbers(where)) == literal(value[where]))
        return node


def indices(tensor: Tensor) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, tensor.shape)))


def numbers(where: tuple[int, ...]) -> tuple[z3.ArithRef, ...]:
    return tuple(map(z3.IntVal, where))


def literal(element: Tensor) -> z3.ExprRef:
    return terms.literal(element.item(), element.dtype)


def chosen(tensor: Tensor, index: tuple[Any, ...]) -> z3.ExprRef:
    term = literal(tensor.flatten()[0])
    for where in indices(tensor):
        term = z3.If(z3.And([a == b for a, b in zip(index, where, strict=True)]), literal(tensor[where]), term)
    return term


def assert_elements(evaluator: Evaluator, node: Node, real: Tensor, *facts: z3.BoolRef) -> None:
    """Given ``facts``, the term of ``node`` at every index can be nothing but the element of ``real``."""
    different = [evaluator.at(node, numbers(where)) != literal(real[where]) for where in indices(real)]
    solver = evaluator.solver()
    solver.add(*facts)
    assert different and solver.check() == z3.sat, "nothing would be compared"
    solver.add(z3.Or(different))
    assert solver.check() == z3.unsat, f"{node.target} may differ: {solver.model()}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}")
def test_an_operation_model_gives_the_elements_that_pytorch_gives(case: Any) -> None:
    one = OneNode(*case)
    assert_elements(one.evaluator, one.node, one.real)


def test_every_operation_model_is_compared_with_pytorch() -> None:
    assert set(MODELS) - {target for target, _, _ in CASES} == {operator.getitem}  # in DYNAMIC: "running maximum"


DYNAMIC: dict[str, Callable[[Tensor], Tensor]] = {
    "outer comparison": lambda x: torch.arange(x.shape[0])[:, None] >= torch.arange(x.shape[0])[None] - 2,
    "slice from the end": lambda x: torch.arange(x.shape[0] + 3)[-x.shape[0] :],
    "slice to the end": lambda x: torch.arange(2 * x.shape[0] + 2)[x.shape[0] : -1],
    "last element": lambda x: torch.arange(x.shape[0])[-1].expand(3),
    "cat of two lengths": lambda x: torch.cat(
        [torch.arange(x.shape[0]), torch.arange(4) * 5, torch.arange(x.shape[0])]
    ),
    "merge": lambda x: (torch.arange(x.shape[0])[:, None] * 3 + torch.arange(4)).reshape(-1),
    "split": lambda x: torch.arange(6 * x.shape[0]).reshape(-1, 3, 2),
    "segments": lambda x: torch.diff(torch.arange(x.shape[0]), prepend=torch.arange(1) - 1).ne(1).cumsum(0),
    "gather": lambda x: torch.arange(x.shape[0])[torch.arange(x.shape[0]) - x.shape[0]],
    "choice": lambda x: torch.where(torch.arange(x.shape[0]) < 3, torch.arange(x.shape[0]), -x.shape[0]),
    "running maximum": lambda x: (torch.arange(x.shape[0]) >= 0).long().cummax(0).values + torch.arange(x.shape[0]),
    "size as a number": lambda x: torch.arange(x.shape[0]) + (x.shape[0] // 2) * 4 - x.shape[0] % 3,
    "padding": lambda x: pad(torch.arange(x.shape[0]), (2, 3), value=-1),
    "padding with nothing": lambda x: pad(torch.arange(x.shape[0]), (1, 0)),
    "largest size": lambda x: torch.arange(x.shape[0]) + max(x.shape[0], 5),
}


@functools.cache
def of_dynamic_length() -> ExportedProgram:
    """Every function of DYNAMIC, in order, for length 1..6."""
    together = lambda x: [function(x) for function in DYNAMIC.values()]  # noqa: E731
    return tiny.program_of(together, torch.zeros(5), dynamic=({0: tiny.length(1, 6)},))


@pytest.mark.parametrize("name", DYNAMIC)
def test_a_term_over_a_dynamic_length_is_right_at_every_length(name: str) -> None:
    program = of_dynamic_length()
    node = program.graph.output_node().args[0][list(DYNAMIC).index(name)]
    (symbol,) = symbol_ranges(program)
    for length in range(1, 7):
        evaluator = Evaluator(symbol_ranges(program), {})
        real = DYNAMIC[name](torch.zeros(length))
        if real.numel():
            assert_elements(evaluator, node, real, z3.Int(symbol) == length)


UNMODELLED = {
    "varying sum": (aten.cumsum.default, (ints(4), 0), {}),
    "bitwise arithmetic": (aten.bitwise_and.Tensor, (ints(4), ints(4)), {}),
    "integer complement": (aten.bitwise_not.default, (ints(4),), {}),
    "product of inputs": (aten.mul.Tensor, (ints(4), ints(4)), {}),
    "squeeze of a size that is not 1": (aten.squeeze.dim, (ints(2, 3), 0), {}),
    "no model at all": (aten.erf.default, (ints(4),), {}),
    "narrow sum of inputs": (aten.add.Tensor, (positions(2**31 - 1, 0).int(), positions(1, 1).int()), {}),
    "narrowing": (aten._to_copy.default, (positions(0, 300),), {"dtype": torch.int8}),
    "remainder of an unknown": (aten.remainder.Tensor, (ints(4), positions(1, 2, 3, 4)), {}),
    "quotient of inputs": (aten.div.Tensor, (ints(4), ints(4)), {}),
    "some element": (aten.any.dim, (positions([1, 0], [0, 0]) == 1, 1), {}),
    "every element": (aten.all.dim, (positions([1, 1], [0, 1]) == 1, 1), {}),
    "fractional bound": (aten.le.Scalar, (ints(4), 0.5), {}),
    "second difference": (aten.diff.default, (ints(6), 2), {}),
    "torch's empty tensor in a cat": (aten.cat.default, ([torch.zeros(0, dtype=torch.int64), ints(2, 3)], 1), {}),
    "transposing reshape": (aten.view.default, (ints(4, 6), [3, 8]), {}),
}


@pytest.mark.parametrize("name", [name for name in UNMODELLED if name != "transposing reshape"])
def test_what_has_no_exact_model_becomes_an_unknown_of_its_own(name: str) -> None:
    one = OneNode(*UNMODELLED[name])
    where = z3.Ints("i j k l")[: one.real.dim()]
    term = one.evaluator.at(one.node, tuple(where))
    assert one.evaluator.reads(term) == {one.node.name}
    assert term.decl().kind() == z3.Z3_OP_UNINTERPRETED


def test_a_reshape_that_regroups_static_sizes_is_still_exact() -> None:
    one = OneNode(*UNMODELLED["transposing reshape"])
    assert_elements(one.evaluator, one.node, one.real)


def claim_holds(function: Callable[[Tensor], Tensor], longest: int = 9) -> bool:
    """Whether the boolean result is proved true at every index for int64 input [length], 1 <= length <= longest."""
    zeros = torch.zeros(7, dtype=torch.int64)
    program = tiny.program_of(function, zeros, dynamic=({0: tiny.length(1, longest)},))
    (node,) = program.graph.output_node().args[0]
    evaluator = Evaluator(symbol_ranges(program))
    index = tuple(z3.Ints("i j k")[: node.meta["val"].dim()])
    return evaluator.proves(evaluator.at(node, index), *in_range(evaluator, node, index))


BIG = 2**62
OVERFLOWING: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "successor of an input": (lambda p: p + 1 > p, positions(INT64_MAX)),
    "difference of inputs": (lambda p: (p - 1 < p) | (p[:1] > 0), positions(-INT64_MAX - 1)),
    "multiple of an input": (lambda p: (p * 2 >= p) | (p < 0), positions(BIG)),
    "difference along an input": (
        lambda p: (p.diff(prepend=p[:1]) <= 0) | (p >= p[:1]), positions(BIG + 2, -BIG, -BIG, -BIG)
    ),
    "constant beside an index": (lambda p: torch.arange(p.shape[0]) + INT64_MAX >= 0, positions(0, 0)),
    "multiple of an index": (lambda p: torch.arange(p.shape[0]) * BIG >= 0, positions(0, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", OVERFLOWING)
def test_a_claim_that_only_unbounded_integers_satisfy_is_not_proved(name: str) -> None:
    function, witness = OVERFLOWING[name]
    assert not function(witness).all(), "the witness must break the claim in 64 bits"
    assert not claim_holds(function)


def test_the_same_claims_are_proved_where_nothing_can_overflow() -> None:
    assert claim_holds(lambda p: torch.arange(p.shape[0]) + 1 > torch.arange(p.shape[0]))
    assert claim_holds(lambda p: torch.arange(p.shape[0]) * 2**40 >= 0)
    assert claim_holds(lambda p: (p > 3) + 1 >= 1)


FRACTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "no number is below itself": lambda p: p * 0.5 >= p * 0.5,  # false of NaN
    "between neighbours": lambda p: (p.double() <= 0.5) | (p.double() >= 1),
    "rounded": lambda p: p.half() + 1 > p.half(),
}


@pytest.mark.parametrize("name", FRACTIONS)
def test_nothing_is_proved_about_fractions_that_may_be_anything(name: str) -> None:
    assert not claim_holds(FRACTIONS[name])


def test_contradictory_assumptions_prove_nothing() -> None:
    i = z3.Int("i")
    assert Evaluator({}).proves(i * 2 != 3, i > 0)
    assert not Evaluator({}).proves(i * 2 != 3, i > 0, i < 0)


def test_the_value_of_an_input_without_dimensions_is_an_unknown() -> None:
    program = tiny.program_of(lambda p: p.expand(3) == p, torch.tensor(4))
    (node,) = program.graph.output_node().args[0]
    evaluator = Evaluator({})
    assert evaluator.proves(evaluator.at(node, (z3.IntVal(1),)))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("llama", {}),
        pytest.param("llama", {"inputs": ("input_ids", "attention_mask"), "batch": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_missing_operation_model_costs_proofs_and_never_makes_a_mask_droppable(
    name: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tiny.traced(name, **how).program
    call = find_calls(program.graph_module)[0]

    def proof() -> tuple[str, str]:
        found = Prover(symbol_ranges(program), frozenset(program.graph_signature.user_inputs)).prove(call)
        return found.mask.name, found.status

    whole = proof()
    assert whole[1] == "proved"
    lost = set()
    for target in {node.target for node in program.graph.nodes if node.target in MODELS}:
        with monkeypatch.context() as patch:
            patch.delitem(MODELS, target)
            without = proof()
        # Causal and "something that only an unmodelled operation knows" is padding or packed: weaker, kept, and true.
        assert without == whole or without[0] in ("padding", "packed", "arbitrary"), target
        lost |= {target} if without != whole else set()
    assert {aten.arange.default, aten.le.Tensor, aten.__and__.Tensor} <= lost


def test_ctrl_c_during_a_proof_is_not_taken_for_a_proof_that_failed() -> None:
    """z3 handles SIGINT itself unless told not to: its answer is then "unknown", and nobody hears of the signal."""
    solver = Evaluator({}).solver()
    x, y, z = z3.Ints("x y z")
    solver.set("timeout", 2000)
    solver.add(x > 2, y > 2, z > 2, x * x * x + y * y * y == z * z * z)
    timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        solver.check()
        time.sleep(1)
