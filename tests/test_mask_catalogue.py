"""Every mask of the catalogue: what may be dropped is, what may not be is kept, and PyTorch says who is right."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import tiny
import torch
from mask_catalogue import CATALOGUE, SETTINGS, UNDECIDED, Inputs, masks_of
from mask_tables import CLASSES, DROPPED, is_true, table_of
from torch import Tensor

from passes.proof import counterexample
from passes.proof.calls import find_calls
from passes.proof.masks import Proof, prover_of

LENGTHS = (1, 2, 3, 5, 8, 9, 21, 38, 39, 40)


def entries() -> list[tuple[str, str, str, str]]:
    return [
        (setting, kind, name, program)
        for setting, kinds in CATALOGUE.items()
        for kind, programs in kinds.items()
        for name, program in programs.items()
    ]


def contents(keys: int) -> Iterator[Inputs]:
    places = torch.arange(keys)
    extremes = torch.iinfo(torch.int64)
    yield Inputs(places, places >= 0, torch.tensor(0))
    yield Inputs(places // 3, places > 0, torch.tensor(1))
    yield Inputs(places.flip(0), places < keys - 1, torch.tensor(9))
    yield Inputs(torch.full((keys,), extremes.min), places < 0, torch.tensor(extremes.max))
    yield Inputs(torch.full((keys,), 2**32 - 1) - places, places % 2 == 0, torch.tensor(-3))


@functools.cache
def proved(setting: str) -> dict[str, Proof]:
    """The proofs of all programs of ``setting``: one export, whose masks are given to one attention call in turn."""
    past, lengths = SETTINGS[setting].past, SETTINGS[setting].lengths
    every = {name: program for programs in CATALOGUE[setting].values() for name, program in programs.items()}

    def attention(query: Tensor, key: Tensor, *inputs: Tensor) -> list[Tensor]:
        masks = masks_of(every.values(), query.shape[2], key.shape[2], Inputs(*inputs))
        return [torch.nn.functional.scaled_dot_product_attention(query, key, key), *masks]

    keys = 7 + past
    query, key = (
        torch.zeros(*heads, size, 16) for heads, size in ((SETTINGS[setting].query, 7), (SETTINGS[setting].key, keys))
    )
    dynamic = None
    if lengths[0] != lengths[1]:
        length = tiny.length(*lengths)
        dynamic = ({2: length}, {2: length + past}, {0: length + past}, {0: length + past}, None)
    exported = tiny.program_of(attention, query, key, *next(contents(keys)), dynamic=dynamic)
    prover = prover_of(exported)
    (call,) = find_calls(exported.graph_module)
    (outputs,) = exported.graph.output_node().args
    assert isinstance(outputs, tuple)
    return {name: prover.prove(replace(call, mask=node)) for name, node in zip(every, outputs[1:], strict=True)}


@pytest.fixture(autouse=True)
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counterexamples decide nothing, and take most of the time."""
    monkeypatch.setattr(counterexample, "find", lambda *_, **__: None)


def masks(setting: str, program: str) -> Iterator[tuple[Tensor, int, int]]:
    """The mask for every length and content that is tried, with the numbers of queries and keys."""
    low, high = SETTINGS[setting].lengths
    for queries in LENGTHS if low != high else (low,):
        keys = queries + SETTINGS[setting].past
        for inputs in contents(keys):
            yield *masks_of([program], queries, keys, inputs), queries, keys


def holds(kind: str, setting: str, program: str) -> bool:
    """Whether every head of every mask is of that class, and dropping it changes no shape."""
    batches, heads = (max(sizes) for sizes in zip(SETTINGS[setting].query, SETTINGS[setting].key, strict=True))
    found = []
    for mask, queries, keys in masks(setting, program):
        mask = mask.expand(torch.broadcast_shapes(mask.shape, (1, 1, queries, keys)))
        if mask.shape[0] not in (1, batches) or mask.shape[1] not in (1, heads):
            return False
        found += [table_of(head) for batch in mask for head in batch]
    return is_true(kind, found)


@pytest.mark.parametrize(
    ("setting", "kind", "name", "program"), entries(), ids=lambda text: text if len(text) < 70 else ""
)
def test_what_may_become_of_it(setting: str, kind: str, name: str, program: str) -> None:
    proof = proved(setting)[name]
    assert not proof.disagreement
    if kind in CLASSES:
        assert holds(kind, setting, program), "the catalogue itself is wrong"
        assert (proof.mask.name, proof.status) == (kind, "proved"), proof
        assert proof.looks
        return
    assert proof.mask.name not in DROPPED, proof
    could_go = [each for each in DROPPED if holds(each, setting, program)]
    assert bool(could_go) == (name in UNDECIDED), f"the catalogue itself is wrong: {could_go}"


def test_it_is_a_catalogue() -> None:
    assert len(entries()) >= 150 and len({name for _, kind, name, _ in entries()}) > 140
