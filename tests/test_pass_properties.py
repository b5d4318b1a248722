"""Every pass leaves random programs (``rewrite_programs``) what they were: before and after run on the same inputs.

Bit for bit where the pass claims that it rounds nothing; otherwise within the rounding of float64, in which the
programs run, so that no other value can hide behind it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import tiny
import torch
from hypothesis import HealthCheck, Phase, given, settings
from rewrite_programs import SIZE, Program, inputs, programs
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule

from passes.graph import query_key_joining
from passes.graph.prepare import prepare
from passes.graph.rewrite import rewrite
from passes.graph.row_narrowing import narrow
from passes.proof import counterexample
from passes.proof.calls import FORMS, find_calls, native_gqa
from passes.proof.sizes import symbol_ranges
from passes.tensorrt import rows
from passes.tensorrt.versions import quiet

ROUNDING = 1e-9
Outputs = tuple[Tensor, ...]
Pass = Callable[[ExportedProgram], int]
"""Changes a prepared program in place; how often it did."""


def exported(program: Program, length: int) -> ExportedProgram:
    with torch.no_grad(), quiet():
        return torch.export.export(program, inputs(length))


def run(module: Callable[..., Outputs], length: int) -> Outputs:
    with torch.no_grad():
        return module(*inputs(length, seed=1))


def run_program(program: ExportedProgram) -> Outputs:
    """As ``program.module()`` does, which takes a tenth of a second to make."""
    state, given = program.state_dict | program.constants, iter(inputs(SIZE, seed=1))
    values = [state[each.target] if each.target else next(given) for each in program.graph_signature.input_specs]
    with torch.no_grad():
        return program.graph_module(*values)


def grouped(program: ExportedProgram) -> int:
    ranges = symbol_ranges(program)
    return sum(native_gqa(call, ranges) for call in find_calls(program.graph_module))


def strategy(name: str, unproven: str | None = None) -> Pass:
    def rewritten(program: ExportedProgram) -> int:
        return sum(call.action != "untouched" for call in rewrite(program, name, unproven).calls)

    return rewritten


# Pass, and whether it claims that every bit stays.
PASSES: dict[str, tuple[Pass, bool]] = {
    "native_gqa": (grouped, True),
    "narrow": (lambda program: narrow(program.graph_module), False),
    "detect_causal": (strategy("detect_causal", "mask"), False),
    "detect_causal, decompose": (strategy("detect_causal", "decompose"), False),
    "mask_input": (strategy("mask_input"), False),
    "lowering": (strategy("lowering", "keep"), False),
    "decompose": (strategy("decompose"), False),
    "upstream": (strategy("upstream"), True),
}


def assert_same(found: Outputs, wanted: Outputs, exactly: bool, name: str) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype, name
        rounding = 0.0 if exactly else ROUNDING
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding, msg=lambda text: f"{name}: {text}")


def check_passes(program: Program, done: Counter[str]) -> None:
    """Every pass over an exported program, each on its own copy."""
    before = run(program, SIZE)
    prepared = prepare(exported(program, SIZE))
    prepared.graph.lint()
    assert_same(run_program(prepared), before, True, "prepare")
    attends = any(node.target in FORMS for node in prepared.graph.nodes)
    for name, (change, exactly) in PASSES.items() if attends else ():
        changed = copy.deepcopy(prepared)
        done[name] += change(changed) > 0
        changed.graph_module.graph.lint()
        changed.graph_module.recompile()
        assert_same(run_program(changed), before, exactly, name)


def check_narrow(program: Program, done: Counter[str]) -> None:
    """The rows that nothing reads, over programs of any kind."""
    before = run(program, SIZE)
    prepared = prepare(exported(program, SIZE))
    done["narrow"] += narrow(prepared.graph_module) > 0
    prepared.graph_module.graph.lint()
    prepared.graph_module.recompile()
    assert_same(run_program(prepared), before, False, "narrow")


def joined(graph: GraphModule) -> None:
    query_key_joining.join(graph, [node for node in graph.graph.nodes if node.target is rows.LINEAR])


def check_row_passes(program: Program, done: Counter[str]) -> None:
    """The passes over a graph of one row, as lowering hands it on: with its weights in it."""
    before = run(program, 1)
    prepared = prepare(exported(program, 1)).module()
    for name, change, exactly in (("twins", joined, True), ("row_converters", tiny.with_fused_rows, False)):
        changed = copy.deepcopy(prepared)
        change(changed)
        done[name] += [node.target for node in changed.graph.nodes] != [node.target for node in prepared.graph.nodes]
        changed.graph.lint()
        changed.recompile()
        assert_same(run(changed, 1), before, exactly, name)


QUICK = settings(
    max_examples=8, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
LONG = settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


CHECKS = {"program": check_passes, "narrow": check_narrow, "row": check_row_passes}


def sweep(check: Callable[[Program, Counter[str]], None], how: settings) -> Counter[str]:
    done: Counter[str] = Counter()

    @how
    @given(programs(attends=check is check_passes))
    def each(program: Program) -> None:
        try:
            check(program, done)
        except Exception as error:
            steps = [tuple(step) for step in program.steps]
            error.add_note(f"Program({steps}, {program.kept}, {program.choice!r})")
            raise

    each()
    return done


@pytest.fixture(autouse=True)
def no_counterexamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """They decide nothing, and take most of the time."""
    monkeypatch.setattr(counterexample, "find", lambda *_, **__: None)


def test_every_pass_over_a_program_leaves_its_values() -> None:
    done = sweep(check_passes, QUICK)
    assert all(done[name] >= 2 for name in PASSES if name not in ("narrow", "upstream")), done


def test_rows_that_are_read_stay_what_they_were() -> None:
    assert sweep(check_narrow, settings(QUICK, max_examples=15))["narrow"] >= 3


def test_every_pass_over_a_row_leaves_its_values() -> None:
    done = sweep(check_row_passes, QUICK)
    assert done["twins"] >= 2 and done["row_converters"] >= 2, done


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_every_pass_leaves_the_values_of_many_programs(name: str) -> None:
    sweep(CHECKS[name], LONG)
