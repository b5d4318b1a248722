"""The second pair of eyes: a prover that is wrong is found out, the mask is kept, and the reader is told."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor
from torch.export import ExportedProgram

from passes import classify
from passes.graph.rewrite import rewrite
from passes.proof.calls import find_calls
from passes.proof.claims import Claims, Found
from passes.proof.mask import Causal
from passes.proof.masks import prover_of
from passes.proof.second_look import claimed_of, look
from pipeline.config.schema import StrategyConfig
from pipeline.engine.programs import dropped

Mask = Callable[[int, int, Tensor], Tensor]


def causal(queries: int, keys: int, positions: Tensor) -> Tensor:
    return torch.arange(keys) <= torch.arange(queries)[:, None]


WRONG: dict[str, Mask] = {
    "a window of 6": lambda q, k, _: causal(q, k, _) & (torch.arange(q)[:, None] - torch.arange(k) < 6),
    "a window of 200": lambda q, k, _: causal(q, k, _) & (torch.arange(q)[:, None] - torch.arange(k) < 200),
    "the longest length alone": lambda q, k, _: causal(q, k, _) | torch.full((k,), k == 300),
    "packed": lambda q, k, positions: causal(q, k, positions) & (positions.diff(prepend=positions[:1]) >= 0),
    "blocked beyond what a byte holds": lambda q, k, _: torch.arange(k).to(torch.uint8) <= torch.arange(q)[:, None],
    "an additive mask with a bias": lambda q, k, _: torch.where(causal(q, k, _), 0.5, -torch.inf),
}


def program(mask: Mask) -> ExportedProgram:
    def attention(query: Tensor, positions: Tensor) -> Tensor:
        length = query.shape[2]
        return torch.nn.functional.scaled_dot_product_attention(
            query, query, query, attn_mask=mask(length, length, positions)
        )

    length = tiny.length(2, 300)
    return tiny.program_of(attention, torch.zeros(1, 2, 7, 16), torch.arange(7), dynamic=({2: length}, {0: length}))


@pytest.fixture
def gullible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prover that takes every mask for causal."""
    monkeypatch.setattr(Claims, "classify", lambda self: Found(Causal(), ""))


@pytest.mark.wrong_prover
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("strategy", ["detect_causal", "lowering"])
def test_a_wrong_proof_is_found_out_and_the_mask_is_kept(strategy: str, name: str, gullible: None) -> None:
    rewritten = rewrite(program(WRONG[name]), strategy, "mask")

    (call,) = rewritten.calls
    assert (call.mask, call.proof, call.action) == ("arbitrary", "not_proved", "native_mask")
    assert "the prover says causal, the program says otherwise" in call.disagreement
    (note,) = dropped(rewritten, StrategyConfig(name=strategy))
    assert note == call.disagreement and "query " in note and "the mask is kept" in note


@pytest.mark.wrong_prover
def test_what_is_said_names_the_sizes_and_the_input(gullible: None) -> None:
    ((_, proof),) = classify(program(WRONG["packed"]))

    assert "of 4 queries and 4 keys is False, inputs_1 = [3, 2, 1, 0]" in proof.disagreement


def test_a_causal_mask_is_looked_at_and_stays() -> None:
    ((_, proof),) = classify(program(causal))

    assert (proof.mask.name, proof.status, proof.looks, proof.disagreement) == ("causal", "proved", 26, "")


def test_a_look_costs_little() -> None:
    # 15 ms on a quiet machine (asked: 20); the best of five, and three times as much, since other tests run beside it.
    traced = tiny.traced("llama").program
    (call, *_), prover = find_calls(traced.graph_module), prover_of(traced)

    def cost() -> float:
        started = time.process_time()
        assert look(call, prover.constants, prover.ranges, claimed_of(Causal()), {}).runs == 26
        return time.process_time() - started

    assert min(cost() for _ in range(5)) < 0.06
