"""Random mask programs: what is proved of a mask is what brute force finds, for every length and many inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import tiny
import torch
from hypothesis import HealthCheck, Phase, given, settings
from mask_programs import Program, listing, needed, programs, values, without_refused
from mask_tables import CLASSES, DROPPED, Table, is_true, table_of
from torch import Tensor

from passes.proof import counterexample
from passes.proof.calls import find_calls
from passes.proof.masks import Proof, prover_of

LENGTHS = range(3, 9)  # shorter ones are refused by torch.export itself, for slices such as [2:]
EXHAUSTIVE = 4
"""Keys up to which every content of the bool input is tried."""


class Form(NamedTuple):
    """Queries and keys of the attention calls."""

    past: int
    """Keys before the first query."""
    static: bool
    query: tuple[int, int] = (1, 1)
    """Batch and heads."""
    key: tuple[int, int] = (1, 1)

    @property
    def scores(self) -> tuple[int, int]:
        """Batch and heads of the scores, and of attention's result without a mask."""
        return max(self.query[0], self.key[0]), max(self.query[1], self.key[1])

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


def of_scores(mask: Tensor, scores: tuple[int, ...]) -> list[Table]:
    """Where ``mask`` attends in each batch and head of ``scores`` [B, H, L, S]; nothing that is a mask where it does
    not broadcast to them, or makes more of them."""
    try:
        fits = torch.broadcast_shapes(mask.shape, scores) == scores
    except RuntimeError:
        fits = False
    if not fits:
        return [Table(mask, is_mask=False)]
    return [table_of(head) for batch in mask.expand(scores) for head in batch]


def tables(program: Program, form: Form) -> list[dict[str, list[Table]]]:
    """Every mask of ``program`` for every length of ``form`` and many inputs."""
    return [
        {
            name: of_scores(value, (*form.scores, queries, keys))
            for name, value in values(program, queries, keys, *inputs).items()
            if name[0] in "mfw"
        }
        for queries, keys in ((length, length + form.past) for length in form.lengths)
        for inputs in contents(keys)
    ]


# -- proofs ------------------------------------------------------------------------------------------


def proved(program: Program, form: Form) -> dict[str, Proof]:
    """The proof of every mask of ``program``: one export, whose masks are given to one attention call in turn."""
    masks = [statement.name for statement in program if statement.is_mask]

    def attention(x: Tensor, *inputs: Tensor) -> list[Tensor]:
        query, key = (x[:batch, :heads] for batch, heads in (form.query, form.key))
        query = query[:, :, form.past :]
        made = values(program, query.shape[2], x.shape[2], *inputs)
        # Each is an output of its own, also where two are one.
        return [torch.nn.functional.scaled_dot_product_attention(query, key, key), *(made[name] for name in masks)]

    keys = 7 + form.past
    length = tiny.length(LENGTHS.start + form.past, LENGTHS.stop - 1 + form.past)
    dynamic = None if form.static else ({2: length}, {0: length}, {0: length}, None)
    exported = tiny.program_of(attention, torch.zeros(2, 2, keys, 16), *next(contents(keys)), dynamic=dynamic)
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
            except (RuntimeError, IndexError):
                program = without_refused(program, queries, queries + form.past, *inputs)
    return program


STATEMENTS = 180
"""Half of them and more are masks; one export takes them all."""
IN_CI_STATEMENTS = 120
FORMS = {
    "static": (Form(0, True), 2),
    "static, two batches and heads": (Form(0, True, (2, 2), (2, 2)), 2),
    "static, with past keys, broadcast": (Form(3, True, (1, 2), (2, 1)), 2),
    "dynamic, one query head": (Form(0, False, (2, 1), (2, 2)), 2),
    "dynamic, with past keys, one key batch": (Form(3, False, (2, 2), (1, 2)), 2),
}


IN_CI = ("static, with past keys, broadcast", "dynamic, one query head")


class Found(NamedTuple):
    checked: int
    dropped: int

    def __add__(self, other: tuple[int, ...]) -> Found:  # type: ignore[override]
        return Found(self.checked + other[0], self.dropped + other[1])


def judged(program: Program, form: Form) -> dict[str, Found]:
    """How many masks of each kind were proved droppable; fails where a proof is untrue."""
    program = refused_by_none(program, form)
    proofs, every = proved(program, form), tables(program, form)
    wrong = [
        f"{proof.mask.name} ({proof.reason}) of {listing(needed(program, name))}"
        for name, proof in proofs.items()
        if proof.status == "proved"
        and not is_true(proof.mask.name, [each for tables in every for each in tables[name]])
    ]
    assert not wrong, "\n".join(wrong)
    found = {kind: Found(0, 0) for kind in "mfw"}
    for name, proof in proofs.items():
        found[name[0]] += (1, proof.mask.name in DROPPED)
    return found


@pytest.mark.parametrize(
    ("form", "examples"),
    [pytest.param(*each, id=name, marks=[] if name in IN_CI else [pytest.mark.slow]) for name, each in FORMS.items()],
)
def test_what_is_proved_of_a_random_mask_is_so(form: Form, examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of masks in all; a sixth and more of them causal or full."""
    check_many(form, monkeypatch, IN_CI_STATEMENTS, max_examples=examples, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("form", [form for form, _ in FORMS.values()], ids=FORMS)
def test_what_is_proved_of_a_random_mask_is_so_for_random_seeds(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each night others; a failure prints the program."""
    check_many(form, monkeypatch, STATEMENTS, max_examples=60, print_blob=True)


def check_many(form: Form, monkeypatch: pytest.MonkeyPatch, statements: int, **how: Any) -> None:
    monkeypatch.setattr(counterexample, "find", lambda *_, **__: None)  # decides nothing, and takes most of the time
    found = {kind: Found(0, 0) for kind in "mfw"}

    @settings(
        deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), **how
    )  # fmt: skip
    @given(programs(statements))
    def check(program: Program) -> None:
        for kind, more in judged(program, form).items():
            found[kind] += more

    check()
    # The first program that hypothesis draws is the simplest: hardly any masks.
    assert sum(each.checked for each in found.values()) >= statements * 4 // 9 * (how["max_examples"] - 1)
    assert sum(each.dropped for each in found.values()) >= sum(each.checked for each in found.values()) // 6
    assert found["w"].dropped >= found["w"].checked // 12, "nothing that is broadcast is proved"


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
        "sliding_window_offset": (k <= p + 2) & (p + 2 - k < 3),
        "ring": (p + 9 - k) % 7 < 4,
    }
    for kind, table in examples.items():
        assert CLASSES[kind]([table.expand(7, 7)])
        changed = table.expand(7, 7).clone()
        changed[4, 3] = ~changed[4, 3]
        assert not CLASSES[kind]([changed]), kind
    assert not any(is_true(kind, [Table(k <= p, is_mask=False)]) for kind in CLASSES)
