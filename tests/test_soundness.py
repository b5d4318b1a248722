"""Random mask programs: what is proved of a mask is what brute force finds, for every length and many inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
import tiny
import torch
from hypothesis import HealthCheck, Phase, given, settings
from mask_programs import Program, listing, needed, programs, values, without_refused
from mask_tables import CLASSES, DROPPED, Table, is_true, table_of
from torch import Tensor

from passes.proof import counterexample
from passes.proof.calls import find_calls
from passes.proof.masks import MaskProof, prover_of

LENGTHS = range(3, 9)  # shorter ones are refused by torch.export itself, for slices such as [2:]
EXHAUSTIVE = 4
"""Keys up to which every content of the bool input is tried."""


class Form(NamedTuple):
    """Queries and keys of the attention calls."""

    past: int
    """Keys before the first query."""
    static: bool

    @property
    def lengths(self) -> range:
        return range(7, 8) if self.static else LENGTHS


class Inputs(NamedTuple):
    ids: Tensor
    keep: Tensor
    t: Tensor


# -- brute force -------------------------------------------------------------------------------------


def contents(keys: int) -> Iterator[Inputs]:
    """Contents of the run-time inputs for ``keys`` keys."""
    generator = torch.Generator().manual_seed(keys)
    arange, zeros = torch.arange(keys), torch.zeros(keys, dtype=torch.int64)
    most = 2**61  # larger ones may overflow, which some classes exclude
    every = [torch.tensor(bits) for bits in itertools.product((False, True), repeat=keys)] if keys <= EXHAUSTIVE else []
    ids = [
        arange, zeros, zeros + 1, arange % 3, arange // 2, arange.flip(0), arange + 2**40, zeros + most, zeros - most,
        torch.randint(0, 3, (keys,), generator=generator), torch.randint(-9, 300, (keys,), generator=generator),
    ]  # fmt: skip
    keeps = [zeros == 0, zeros == 1, arange > 0, arange < keys - 1, *every]
    ts = [torch.tensor(value) for value in (0, 1, -1, 3, keys, 255, most, -most)]
    for place in range(max(len(ids), len(keeps), len(ts))):
        yield Inputs(ids[place % len(ids)], keeps[place % len(keeps)], ts[place % len(ts)])


def tables(program: Program, form: Form) -> list[dict[str, Table]]:
    """Every mask of ``program`` for every length of ``form`` and many inputs."""
    return [
        {name: table_of(value) for name, value in values(program, queries, keys, *inputs).items() if name[0] in "mf"}
        for queries, keys in ((length, length + form.past) for length in form.lengths)
        for inputs in contents(keys)
    ]


# -- proofs ------------------------------------------------------------------------------------------


def proved(program: Program, form: Form) -> dict[str, MaskProof]:
    """The proof of every mask of ``program``: one export, whose masks are given to one attention call in turn."""
    masks = [name for name, _, _ in program if name[0] in "mf"]

    def attention(x: Tensor, *inputs: Tensor) -> list[Tensor]:
        query = x[:, :, form.past :]
        made = values(program, query.shape[2], x.shape[2], *inputs)
        # Each is an output of its own, also where two are one.
        return [torch.nn.functional.scaled_dot_product_attention(query, x, x), *(made[name] for name in masks)]

    keys = 7 + form.past
    length = tiny.length(LENGTHS.start + form.past, LENGTHS.stop - 1 + form.past)
    dynamic = None if form.static else ({2: length}, {0: length}, {0: length}, None)
    exported = tiny.program_of(attention, torch.zeros(1, 1, keys, 16), *next(contents(keys)), dynamic=dynamic)
    prover = prover_of(exported)
    (call,) = find_calls(exported.graph_module)
    (outputs,) = exported.graph.output_node().args
    return {
        name: prover.prove(replace(call, mask=node)) for name, node in zip(masks, outputs[-len(masks) :], strict=True)
    }


def refused_by_none(program: Program, form: Form) -> Program:
    """``program`` without what PyTorch refuses for some length or input, such as bounds that a type cannot hold."""
    for queries in form.lengths:
        for inputs in contents(queries + form.past):
            try:
                values(program, queries, queries + form.past, *inputs)
            except RuntimeError:
                program = without_refused(program, queries, queries + form.past, *inputs)
    return program


STATEMENTS = 150
"""Some 110 of them are masks; one export takes them all."""
FORMS = {
    "static": (Form(0, True), 10),
    "static, with past keys": (Form(3, True), 8),
    "dynamic": (Form(0, False), 3),
    "dynamic, with past keys": (Form(3, False), 3),
}


@pytest.mark.parametrize(("form", "examples"), FORMS.values(), ids=FORMS)
def test_what_is_proved_of_a_random_mask_is_so(form: Form, examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 masks and more in all; nearly a third of them causal or full."""
    monkeypatch.setattr(counterexample, "find", lambda *_, **__: None)  # decides nothing, and takes most of the time
    checked, dropped = 0, 0

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(programs(STATEMENTS))
    def check(program: Program) -> None:
        nonlocal checked, dropped
        program = refused_by_none(program, form)
        proofs, every = proved(program, form), tables(program, form)
        wrong = [
            f"{proof.mask} ({proof.reason}) of {listing(needed(program, name))}"
            for name, proof in proofs.items()
            if proof.proof == "proved" and not is_true(proof.mask, [tables[name] for tables in every])
        ]
        assert not wrong, "\n".join(wrong)
        checked += len(proofs)
        dropped += sum(proof.mask in DROPPED for proof in proofs.values())

    check()
    assert checked >= 80 * examples and dropped >= checked // 6


def test_brute_force_tells_the_classes_apart() -> None:
    p, k = torch.arange(7)[:, None], torch.arange(7)[None]
    segments = torch.tensor([0, 0, 1, 1, 1, 0, 0])
    examples = {
        "full": k >= 0,
        "causal": k <= p,
        "sliding_window": (k <= p) & (p - k < 3),
        "chunked": (k <= p) & (k // 3 == p // 3),
        "padding": (k <= p) & (k != 2),
        "packed": (k <= p) & (segments[None] == segments[:, None]),
        "causal_offset": k <= p + 2,
    }
    for kind, table in examples.items():
        assert CLASSES[kind]([table.expand(7, 7)])
        changed = table.expand(7, 7).clone()
        changed[4, 3] = ~changed[4, 3]
        assert not CLASSES[kind]([changed]), kind
    assert not any(is_true(kind, [Table(k <= p, is_mask=False)]) for kind in CLASSES)
