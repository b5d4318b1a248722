"""The gate over logits: rounding passes; one wrong position, row, block or number does not, and what is judged by must
be a number itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isnan
from pathlib import Path

import pytest
import tiny
import torch
from conftest import TINY_LLAMA, save_tiny_llama
from runs import DONE, GPU, SMALL, do, failure
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from passes.errors import RunError, UserError
from passes.graph.ops import DECOMPOSED, NATIVE
from pipeline.verify import arithmetic
from pipeline.verify.cases import Case
from pipeline.verify.logits import gate, judge
from pipeline.verify.sections import JudgedCase

ROWS, LENGTH, HIDDEN, VOCABULARY = 2, 40, 64, 1000  # the last block of the vocabulary is a short one
EPS = torch.finfo(torch.bfloat16).eps / 2


def logits_of(noise: float, seed: int, length: int = LENGTH) -> Tensor:
    """[rows, length, vocabulary]: a head over hidden states that are off by ``noise``, at each position by more or
    less, and so by one direction for all of the vocabulary, as rounding in a model is."""
    fixed, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, length, HIDDEN, generator=fixed)
    scale = torch.exp(0.6 * torch.randn(ROWS, length, 1, generator=fixed))
    head = torch.randn(HIDDEN, VOCABULARY, generator=fixed) / 4
    moved = hidden + noise * scale * torch.randn(hidden.shape, generator=own)
    return moved @ head + 1.0


def rounded(seed: int, length: int = LENGTH) -> Tensor:
    return logits_of(0.01, seed, length).bfloat16().float()


def judged(
    candidate: Tensor, truth: Tensor | None = None, own: Tensor | None = None, padding: Tensor | None = None
) -> JudgedCase:
    """One case, logits given."""
    length = candidate.shape[1]
    truth = logits_of(0.0, 0, length) if truth is None else truth
    own = rounded(1, length) if own is None else own
    (case,) = judge(
        [Case("case", length, "none", 0)],
        lambda case: ({}, padding),
        lambda _: truth,
        {"pytorch": lambda _: own},
        lambda _: candidate,
        EPS,
        lambda done, total: None,
    )
    return case


@pytest.mark.parametrize("seed", range(2, 22))
def test_rounding_of_another_seed_passes_at_every_position(seed: int) -> None:
    case = judged(rounded(seed))

    assert case.passed and case.positions_judged == ROWS * LENGTH and case.positions_failed == 0
    assert case.worst_position.found <= case.worst_position.allowed
    gate([case])


def one_position(x: Tensor) -> None:
    x[1, 17] = x[1, 16]


def one_row(x: Tensor) -> None:
    x[1] = x[0]


def one_block(x: Tensor) -> None:
    x[..., 256:384] = x[..., 384:512]


def one_tile(x: Tensor) -> None:
    x[0, 5, 256:384] = x[0, 5, 384:512]


def short_last_block(x: Tensor) -> None:
    x[..., 896:] = 0


def constant(x: Tensor) -> None:
    x += 0.5  # less than a quarter of the logits' own spread; no probability changes


def constant_at_one_position(x: Tensor) -> None:
    x[0, 9] += 2.0


def scaled(x: Tensor) -> None:
    x *= 1.1


def one_logit(x: Tensor) -> None:
    x[0, 3, 77] += 2.0


def not_a_number(x: Tensor) -> None:
    x[0, 3, 77] = float("nan")


def infinite(x: Tensor) -> None:
    x[0, 3, 77] = float("-inf")


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        (one_position, (1, 17)), (one_row, None), (one_block, None), (one_tile, (0, 5)), (short_last_block, None),
        (constant, None), (constant_at_one_position, (0, 9)), (scaled, None), (one_logit, (0, 3)),
        (not_a_number, (0, 3)), (infinite, (0, 3)),
    ],
)  # fmt: skip
def test_what_is_wrong_in_places_fails_and_the_worst_place_is_named(
    fault: Callable[[Tensor], None], where: tuple[int, int] | None
) -> None:
    logits = rounded(2)
    fault(logits)
    case = judged(logits)

    assert not case.passed
    if where is not None:
        assert case.positions_failed == 1
        assert (case.worst_position.row, case.worst_position.position) == where
    with pytest.raises(RunError) as caught:
        gate([case])
    assert caught.value.kind == "accuracy"
    if where is not None:
        assert f"1 of {ROWS * LENGTH} positions, the worst at row {where[0]}, position {where[1]}: " in str(
            caught.value
        )


def test_a_few_wrong_positions_of_many_fail_although_the_one_number_over_all_of_them_passes() -> None:
    length = 1024
    logits = rounded(2, length)
    logits[0, 512] = logits[0, 511]
    own = logits_of(0.05, 1, length)
    case = judged(logits, own=own)

    assert case.relative_error <= case.tolerance and case.kl <= case.allowed_kl
    assert not case.passed and case.positions_failed == 1


def test_a_block_of_the_vocabulary_that_is_slightly_wrong_everywhere_fails_by_itself() -> None:
    logits = rounded(2)
    logits[..., 256:384] += 0.1  # of 2.2, the logits' own size
    case = judged(logits)

    assert case.relative_error <= case.tolerance and case.positions_failed == 0
    assert not case.passed
    assert (case.worst_block.first, case.worst_block.last) == (256, 383)
    with pytest.raises(RunError, match="tokens 256 to 383 of the vocabulary: relative error"):
        gate([case])


def test_a_candidate_that_is_coarser_everywhere_may_be_so_at_each_position_and_no_further() -> None:
    truth, length = logits_of(0.0, 0, 512), 512
    coarse = truth + 2.5 * (logits_of(0.01, 2, length) - truth)
    case = judged(coarse, own=rounded(1, length))
    assert case.passed and 2 < case.relative_error / case.tolerance * 3 < 3

    coarse[0, 100] = truth[0, 99]
    case = judged(coarse, own=rounded(1, length))
    assert not case.passed and case.positions_failed == 1
    assert (case.worst_position.row, case.worst_position.position) == (0, 100)


def test_a_candidate_that_is_coarser_everywhere_may_be_so_in_each_block_and_no_further() -> None:
    """As Gemma 3 270M in fp8: 2.4 times PyTorch's error over all positions, and a tenth beyond three times in a block
    where the candidate's own error is the largest of its blocks."""
    truth, rounding = logits_of(0.0, 0, 512), logits_of(0.01, 2, 512) - logits_of(0.0, 0, 512)

    def with_errors(everywhere: float, in_block: float) -> JudgedCase:
        errors = everywhere * rounding
        errors[..., 384:512] = in_block * rounding[..., 384:512]
        return judged(truth + errors, own=rounded(1, 512))

    fine, outstanding = with_errors(2.4, 3.5), with_errors(1.5, 6)
    assert fine.passed and outstanding.relative_error <= outstanding.tolerance
    assert not outstanding.passed
    assert (outstanding.worst_block.first, outstanding.worst_block.last) == (384, 511)


def test_a_position_may_be_as_wrong_as_pytorch_is_there_and_no_other_for_that() -> None:
    own, logits = rounded(1), rounded(2)
    own[1, 30] = logits_of(0.0, 0)[1, 30] * 1.5  # PyTorch itself loses it
    logits[1, 30] = logits_of(0.0, 0)[1, 30] * 0.6
    assert judged(logits, own=own).positions_failed == 0
    logits[1, 31] = logits_of(0.0, 0)[1, 31] * 0.6
    assert judged(logits, own=own).worst_position.position == 31


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_reference_that_is_no_number_is_the_models_failure(broken: float) -> None:
    truth = logits_of(0.0, 0)
    truth[1, 7, 3] = broken
    with pytest.raises(RunError, match="case: at row 1, position 7, PyTorch's own logits one type wider") as caught:
        judged(rounded(2), truth=truth)
    assert caught.value.kind == "model"


def test_logits_that_overflow_in_pytorch_at_the_runs_precision_are_named() -> None:
    own = rounded(1)
    own[0, 2, 3] = float("inf")
    with pytest.raises(RunError, match="at row 0, position 2, PyTorch's own logits at the run's precision") as caught:
        judged(rounded(2), own=own)
    assert caught.value.kind == "precision"


def test_padding_is_not_judged() -> None:
    padding = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    padding[0, :10] = True
    truth, logits = logits_of(0.0, 0), rounded(2)
    truth[0, 4], logits[0, 6] = float("nan"), 0.0
    case = judged(logits, truth=truth, padding=padding)
    assert case.passed and case.positions_judged == ROWS * LENGTH - 10


# The arithmetics


def test_only_tensorrt_rtx_is_judged_by_products_that_are_added_up_in_fp16() -> None:
    def names(*computing: str) -> list[str]:
        return list(arithmetic.yardsticks(*computing))

    assert names("engine", "fp16", "tensorrt_rtx") == ["pytorch", "pytorch_fp16_accumulation"]
    assert names("engine", "fp32", "tensorrt_rtx") == ["pytorch", "pytorch_tf32"]
    assert names("engine", "fp16", "tensorrt") == names("engine", "fp32", "tensorrt") == ["pytorch"]
    assert names("engine", "bf16", "tensorrt_rtx") == names("graph", "fp16", "tensorrt_rtx") == ["pytorch"]
    assert "products added up in fp32" in arithmetic.described("engine", "fp16", "tensorrt")
    assert "the GPU's kernels did not run" in arithmetic.described("graph", "fp16", "tensorrt_rtx")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_fast_arithmetic_of_a_cpu_gives_what_torchs_own_kernels_give(precision: str) -> None:
    model, tokens = tiny.model("qwen2", precision), tiny.tokens(2, 30)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        with arithmetic.on_cpu(precision)():
            got = model(input_ids=tokens).logits
        wide = tiny.model("qwen2")(input_ids=tokens).logits
    assert got.dtype == expected.dtype
    error, own = ((x.float() - wide).norm() for x in (got, expected))
    assert float(error) == pytest.approx(float(own), rel=0.25) and float(own) > 0


def test_what_does_not_fit_fp16_overflows_there_and_only_there() -> None:
    x = torch.full((1, 4, 64), 100.0)
    weight = torch.full((3, 64), 20.0)
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        with arithmetic.on_cpu(precision)():
            product = torch.nn.functional.linear(x.to(dtype), weight.to(dtype))
        assert product.dtype == dtype and bool(product.isinf().all()) == (precision == "fp16")


def test_attention_that_is_written_out_is_rounded_between_its_products() -> None:
    """So the strategies no longer score the same where no GPU runs them."""
    q, k, v = (torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(i)).half() * 4 for i in range(3))
    with arithmetic.on_cpu("fp16")():
        native = NATIVE(q, k, v, None, "none", 1.0)
        written_out = DECOMPOSED(q, k, v, None, False, 1.0)
    wide = scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=1.0)
    errors = [float((x.double() - wide).norm() / wide.norm()) for x in (native, written_out)]
    assert errors[0] < 3e-4 and 2 * errors[0] < errors[1] < 1e-2


# Whole runs


@pytest.fixture
def overflowing(tmp_path: Path) -> Path:
    """A tiny Llama whose gated activations reach 1e5: more than fp16 holds."""
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=1)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "gate_proj" in name or "up_proj" in name:
            weights[name] *= 1500
        if "down_proj" in name:
            weights[name] *= 1e-6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_model_that_overflows_fp16_is_refused_before_anything_is_built(
    overflowing: Path, store: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"^precision=fp16: .* beyond its range.*; set precision=bf16$"):
        do(store, tmp_path / "out", overflowing, "precision=fp16", *SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_that_overflows_fp16_passes_in_bf16(overflowing: Path, store: str, tmp_path: Path) -> None:
    outcome = do(store, tmp_path / "out", overflowing, "precision=bf16", *SMALL)

    assert outcome.report["status"] == DONE, outcome.report["failure"]
    said = "bf16 on the CPU, products added up in fp32; the engine and the GPU's kernels did not run"
    assert GPU or outcome.report["verify"]["arithmetic"] == said
    case = json.loads((outcome.folder / "report.json").read_text())["verify"]["cases"][0]
    assert {"row", "position", "measure", "found", "allowed"} == set(case["worst_position"])


def test_weights_that_are_no_numbers_are_the_models_failure(store: str, tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=1)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][5] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert isnan(float(weights["model.norm.weight"].sum())) and TINY_LLAMA["hidden_size"] > 5

    outcome = do(store, tmp_path / "out", folder, *SMALL)

    assert failure(outcome) == ("verify", "model")
    assert "not finite" in outcome.report["failure"]["message"]
