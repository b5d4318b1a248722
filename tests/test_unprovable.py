"""Graphs that are beyond the prover: each is kept with a reason, and none of them ends in an exception."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from passes.proof import counterexample
from passes.proof.calls import find_calls
from passes.proof.masks import Proof, prover_of

SLOW = pytest.mark.slow
aten = torch.ops.aten
LONGEST = 12


@pytest.fixture(autouse=True)
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counterexamples decide nothing, and take most of the time."""
    monkeypatch.setattr(counterexample, "find", lambda *_, **__: None)


def causal(queries: Any, keys: Any) -> Tensor:
    return torch.arange(keys)[None] <= torch.arange(queries)[:, None]


def program(*masks: Callable[..., Tensor], inputs: tuple[Tensor, ...] = ()) -> ExportedProgram:
    """Attention of x [1, 2, length, 16] to itself under each of ``masks`` (of the length and the inputs) in turn."""

    def attention(x: Tensor, *inputs: Tensor) -> list[Tensor]:
        made = [mask(x.shape[2], *inputs) for mask in masks]
        return [torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask) for mask in made]

    dynamic = ({2: tiny.length(1, LONGEST)}, *(None for _ in inputs))
    return tiny.program_of(attention, torch.zeros(1, 2, 7, 16), *inputs, dynamic=dynamic)


def proofs(exported: ExportedProgram) -> list[Proof]:
    prover = prover_of(exported)
    return [prover.prove(call) for call in find_calls(exported.graph_module)]


# -- nested graphs -----------------------------------------------------------------------------------

# What is pinned -> a mask that a nested graph makes, of the length and of a condition.
NESTED: dict[str, Callable[..., Tensor]] = {
    "either of two masks": lambda n, flag: torch.cond(flag, lambda c: c & c, lambda c: c | ~c, (causal(n, n),)),
    "the same in both branches": lambda n, flag: torch.cond(flag, lambda c: c & c, lambda c: c | c, (causal(n, n),)),
    "a mask that is added": lambda n, flag: torch.cond(
        flag, lambda c: torch.where(c, 0.0, -torch.inf), lambda c: torch.where(c, 0.0, -1e4), (causal(n, n),)
    ),
    "one of two results": lambda n, flag: torch.cond(
        flag, lambda c: (c & c, c | c), lambda c: (c | c, ~c), (causal(n, n),)
    )[1],
    "by the length": lambda n, flag: torch.cond(n > 4, lambda c: c & c, lambda c: ~c, (causal(n, n),)),
    "made of numbers": lambda n, flag: (
        torch.arange(n)[None] <= torch.cond(flag, lambda q: q + 1, lambda q: q + 0, (torch.arange(n)[:, None],))
    ),
}  # fmt: skip


def whatever(n: Any, flag: Tensor) -> Tensor:
    """Causal whichever branch is taken."""
    either = torch.cond(flag, lambda c: c & c, lambda c: ~c, (causal(n, n),))
    return causal(n, n) & (either | ~either)


def test_a_mask_that_a_nested_graph_makes_is_kept_unless_it_holds_whatever_that_gives() -> None:
    exported = program(*NESTED.values(), whatever, inputs=(torch.tensor(True),))
    nested = [node for node in exported.graph.nodes if node.target is torch.ops.higher_order.cond]
    assert len(nested) == len(NESTED) + 1
    *kept, dropped = proofs(exported)
    for name, found in zip(NESTED, kept, strict=True):
        assert (found.mask.name, found.status) in (("arbitrary", "not_proved"), ("bias", "not_proved")), name
        assert "no exact model" in found.reason, name
    assert dropped.causal


# -- very long chains --------------------------------------------------------------------------------

STEPS = 3000
# What is pinned -> the arguments of the operation that each step applies to the one before.
CHAINS: dict[str, tuple[Any, Callable[[Node], tuple[Any, ...]]]] = {
    "one operand": (aten.bitwise_not.default, lambda last: (last,)),
    "both operands": (aten.bitwise_and.Tensor, lambda last: (last, last)),
    "a choice": (aten.where.self, lambda last: (last, last, last)),
    "moved": (aten.flip.default, lambda last: (last, [0, 1])),
    "joined": (aten.stack.default, lambda last: ([last, last],)),
    "settled along a row": (aten.any.dim, lambda last: (last, 1, True)),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("both operands", "a choice", "moved") else SLOW) for name in CHAINS],
)
def test_a_mask_behind_thousands_of_operations_is_kept(name: str) -> None:
    exported = program(lambda n: causal(n, n))
    (call,) = find_calls(exported.graph_module)
    last = call.mask
    assert last is not None
    target, arguments = CHAINS[name]
    for _ in range(STEPS):
        with exported.graph.inserting_before(call.node):
            node = exported.graph.call_function(target, arguments(last))
            node.meta["val"] = last.meta["val"]
            if target is aten.stack.default:  # taken apart again
                pair, node.meta["val"] = node, last.meta["val"].new_empty((2, *last.meta["val"].shape))
                node = exported.graph.call_function(aten.select.int, (pair, 0, 1))
                node.meta["val"] = last.meta["val"]
            last = node
    found = prover_of(exported).prove(replace(call, mask=last))
    assert (found.mask.name, found.status) == ("arbitrary", "not_proved") and found.reason


# -- scalars that fit no type ------------------------------------------------------------------------


def bytes_of(n: Any) -> Tensor:
    return torch.arange(n)[None].to(torch.uint8)


def filled(value: float, dtype: torch.dtype) -> Callable[[Any], Tensor]:
    """True where a tensor of ``dtype`` that is filled with ``value`` is not 0."""
    return lambda n: torch.full((1, n), value, dtype=dtype) != 0


# A condition beside the causal mask, which backends decide differently or PyTorch refuses when it runs.
SCALARS: dict[str, Callable[[Any], Tensor]] = {
    "a byte of 256": filled(256, torch.uint8),
    "a signed byte of 128": filled(128, torch.int8),
    "32 bits of 2^31": filled(2**31, torch.int32),
    "64 bits of 1e30": filled(1e30, torch.int64),
    "an integer that is no number": filled(float("nan"), torch.int64),
    "an infinite integer": filled(float("inf"), torch.int64),
    "an integer of a half": filled(0.5, torch.int64),
    "300 added to a byte": lambda n: bytes_of(n) + 300 != 300,
    "-1 added to a byte": lambda n: bytes_of(n) + -1 != 300,
    "a byte below 1000": lambda n: bytes_of(n) < 1000,
    "a byte of -1 or more": lambda n: bytes_of(n) >= -1,
    "a byte against 256": lambda n: bytes_of(n) != 256,
    "a byte against a tensor of 300": lambda n: bytes_of(n) < torch.tensor(300),
    "a byte divided by 300": lambda n: bytes_of(n) // 300 == 0,
    "a byte's remainder by 256": lambda n: bytes_of(n) % 256 == bytes_of(n),
    "a byte clamped to 1000": lambda n: bytes_of(n).clamp(min=1000) > 3,
    "a byte filled with 300": lambda n: bytes_of(n).masked_fill(bytes_of(n) > 3, 300) != 44,
    "a byte or 300": lambda n: torch.where(bytes_of(n) > 3, 300, bytes_of(n)) != 300,
    "a byte times 300": lambda n: torch.add(bytes_of(n), bytes_of(n), alpha=300) < 99,
    "64 bits below 2^63": lambda n: torch.arange(n)[None] < 2**63,
    "64 bits below 1e30": lambda n: torch.arange(n)[None] < 1e30,
    "2^63 added to 64 bits": lambda n: torch.arange(n)[None] + 2**63 != 3,
    "bytes from 300 on": lambda n: torch.arange(300, 300 + n, dtype=torch.uint8)[None] >= 44,
}


def test_a_scalar_that_does_not_fit_its_type_proves_nothing() -> None:
    exported = program(*(lambda n, made=made: causal(n, n) & made(n) for made in SCALARS.values()))
    for name, found in zip(SCALARS, proofs(exported), strict=True):
        assert found.mask.name in ("arbitrary", "padding") and found.status == "not_proved", name
