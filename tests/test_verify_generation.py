"""The gate of generation: what rounding explains passes, one wrong token does not, wherever it stands."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from passes.errors import RunError
from pipeline.rivals.generation import EagerGenerator
from pipeline.rivals.kernels import Kernels
from pipeline.verify.tokens import gate, judge_generation, last_positions

LENGTH, NEW = 9, 8
EPS = torch.finfo(torch.bfloat16).eps / 2


def generated(precision: str, tokens: Tensor, padding: Tensor | None = None, name: str = "qwen3") -> Tensor:
    model = tiny.model(name, precision)
    made = EagerGenerator(model, "dynamic", None, Kernels(model))
    made.prepare(tokens, NEW, padding)
    return made.tokens()


def judged(tokens: Tensor, got: Tensor, padding: Tensor | None = None, precision: str = "bf16", name: str = "qwen3"):
    own, wide = tiny.model(name, precision), tiny.model(name, "fp32")
    return judge_generation(tokens, got, padding, last_positions(own, NEW), last_positions(wide, NEW), 128, EPS)


def test_pytorchs_own_greedy_tokens_pass_and_every_one_is_judged() -> None:
    tokens = tiny.tokens(2, LENGTH)
    case = judged(tokens, generated("bf16", tokens))

    assert case.passed and case.tokens == 2 * NEW
    assert case.flips == 0 or case.worst_gap <= case.allowed_gap


def test_left_padding_is_taken_into_account() -> None:
    tokens, padding = tiny.tokens(2, LENGTH), torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[0, :6] = True
    got = generated("fp32", tokens, padding)

    assert judged(tokens, got, padding, "fp32").flips == 0
    assert not judged(tokens, got, None, "fp32").passed, "another question, another answer"


@pytest.mark.parametrize("at", [0, 3, NEW - 1])
def test_one_wrong_token_fails_wherever_it_stands(at: int) -> None:
    tokens = tiny.tokens(1, LENGTH)
    got = generated("fp32", tokens)
    logits = last_positions(tiny.model("qwen3"), 1)
    worst = logits({"input_ids": torch.cat([tokens, got[:, :at]], dim=1)})[0, -1].argmin()
    got = got.clone()
    got[0, at] = worst
    case = judged(tokens, got, precision="fp32")

    assert not case.passed and case.first_difference == at
    with pytest.raises(RunError, match=rf"first new token {at}, logits .* apart where") as caught:
        gate([case])
    assert caught.value.kind == "accuracy"


def lead_of(lead: float, error: float):
    """Two forwards over a vocabulary of 3: PyTorch prefers token 0 to token 1 by ``lead``, and is off by ``error``."""

    def forward(inputs: dict[str, Tensor]) -> Tensor:
        logits = torch.zeros(*inputs["input_ids"].shape, 3)
        logits[..., 0], logits[..., 1], logits[..., 2] = lead, 0.0, -9.0
        return logits

    def reference(inputs: dict[str, Tensor]) -> Tensor:
        wide = forward(inputs)
        wide[..., 2] += error
        return wide

    return forward, reference


@pytest.mark.parametrize(("lead", "passes"), [(0.0, True), (0.7, True), (0.8, False)])
def test_a_flip_passes_up_to_the_error_of_both_logits(lead: float, passes: bool) -> None:
    forward, reference = lead_of(lead, error=0.125)  # 2 x 3 x 0.125 is allowed
    got = torch.tensor([[0, 1, 0]])
    case = judge_generation(torch.zeros(1, 4, dtype=torch.int64), got, None, forward, reference, 3, EPS / 1e6)

    assert case.passed is passes
    assert case.flips == (lead > 0)
    assert case.allowed_gap == 0.75


def test_tokens_after_an_explained_flip_are_judged_given_that_flip() -> None:
    tokens = tiny.tokens(1, LENGTH)
    wanted = generated("fp32", tokens)
    forward = last_positions(tiny.model("qwen3"), NEW)

    def nearly_tied(inputs: dict[str, Tensor]) -> Tensor:  # the first choice is as good as the second
        logits = forward(inputs).clone()
        best = logits[:, 0].topk(2)
        logits[:, 0].scatter_(1, best.indices[:, 1:], best.values[:, :1] - 1e-7)
        return logits

    second = forward({"input_ids": torch.cat([tokens, wanted[:, :-1]], dim=1)})[:, 0].topk(2).indices[:, 1:]
    rest = generated("fp32", torch.cat([tokens, second], dim=1))[:, : NEW - 1]
    for after, passes in ((rest, True), (wanted[:, 1:], False)):
        got = torch.cat([second, after], dim=1)
        case = judge_generation(tokens, got, None, nearly_tied, forward, 128, EPS)
        assert case.first_difference == 0 and case.passed is passes


def test_tokens_outside_of_the_vocabulary_and_numbers_that_are_none_fail() -> None:
    tokens = tiny.tokens(1, LENGTH)
    got = generated("fp32", tokens)
    with pytest.raises(RunError, match="token 128 is none of the model's 128"):
        judged(tokens, got.index_fill(1, torch.tensor([2]), 128))

    def broken(inputs: dict[str, Tensor]) -> Tensor:
        return last_positions(tiny.model("qwen3"), NEW)(inputs) * float("nan")

    case = judge_generation(tokens, got, None, broken, last_positions(tiny.model("qwen3"), NEW), 128, EPS)
    assert not case.passed and case.flips == NEW


def test_a_reference_that_is_no_number_is_the_models_failure() -> None:
    tokens = tiny.tokens(1, LENGTH)
    forward = last_positions(tiny.model("qwen3"), NEW)

    def broken(inputs: dict[str, Tensor]) -> Tensor:
        logits = forward(inputs).clone()
        logits[0, 3, 5] = float("nan")
        return logits

    with pytest.raises(RunError, match="not finite at new token 3") as caught:
        judge_generation(tokens, generated("fp32", tokens), None, forward, broken, 128, EPS)
    assert caught.value.kind == "model"
