"""GPTQ: against the algorithm written out, what it is worth, and what it meets in models."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from passes.errors import RunError, UserError
from passes.quantised import QuantisedWeight, numbers_of, to_nearest
from pipeline.config.quantize import CalibrationConfig, QuantizeConfig
from pipeline.model import calibration, gptq
from pipeline.model.load import LoadedModel, load, load_reference
from pipeline.model.quantise import quantised
from pipeline.model.real_text import real_text
from pipeline.verify.quality import cost_of
from pipeline.verify.scored import Scored

CPU = torch.device("cpu")
LONG = {"num_hidden_layers": 1, "max_position_embeddings": 256}


def made(method: str, changes: dict[str, Any] | None = None, number_type: str = "fp16", **asked: Any) -> LoadedModel:
    loaded = load(tiny.config("llama", **LONG | (changes or {})), number_type, CPU, 0, lambda _: None)
    return rounded(loaded, method, number_type, **asked)


def rounded(loaded: LoadedModel, method: str, number_type: str = "fp16", **asked: Any) -> LoadedModel:
    wanted = QuantizeConfig(method=method, calibration=CalibrationConfig(samples=8, length=64), **asked)
    return quantised(loaded, "int4_weights", number_type, wanted, 0, lambda _: None)


def rows(count: int, inner: int) -> Tensor:
    """Rows [count, inner] whose elements have to do with each other, as those of models have."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(count, inner // 4, generator=generator) @ torch.randn(inner // 4, inner, generator=generator)
    return mixed + torch.randn(count, inner, generator=generator)


def both(weight: Tensor, block: int, seen: Tensor) -> tuple[QuantisedWeight, QuantisedWeight]:
    """``weight`` rounded to nearest, and by GPTQ over the rows ``seen``."""
    nearest = to_nearest(weight, "int4", block, torch.float16)
    return nearest, gptq.made_up(weight, nearest, gptq.rows_of(seen, seen), torch.float16)


def rounded_at(scales: Tensor, weight: Tensor) -> Tensor:
    """Values int8 of ``weight`` [out, in], each to the nearest at ``scales`` [out, blocks]."""
    steps = scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    return (weight / steps).round().clamp(-8, 7).to(torch.int8)


# ---- the algorithm


def column_by_column(weight: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """The paper's algorithm without its Cholesky factor and its lazy blocks: after each column the inverse of what is
    left of H anew, in float64."""
    inner = weight.shape[1]
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(inner)
    order = hessian.diagonal().argsort(descending=True).tolist()
    left, steps = weight.double().clone(), scales.double().repeat_interleave(inner // scales.shape[1], 1)
    found = torch.empty_like(weight, dtype=torch.int8)
    while order:
        at, *order = order
        inverse = torch.linalg.inv(damped[[at, *order]][:, [at, *order]])
        value = (left[:, at] / steps[:, at]).round().clamp(-8, 7)
        error = (left[:, at] - value * steps[:, at]) / inverse[0, 0]
        left[:, order] -= error[:, None] * inverse[0, 1:]
        found[:, at] = value.to(torch.int8)
    return found


@pytest.mark.parametrize("inner", [64, 160, 256])  # one lazy block that is not whole, one and a part, two
def test_values_are_those_of_the_algorithm_column_by_column(inner: int) -> None:
    weight, seen = torch.randn(24, inner, generator=torch.Generator().manual_seed(0)), rows(500, inner)
    _, found = both(weight, 32, seen)
    assert torch.equal(found.values, column_by_column(weight, found.scales, seen.T @ seen))


@pytest.mark.parametrize("block", [32, 64, 128])
def test_what_a_layer_answers_is_nearer_than_with_rounding(block: int) -> None:
    weight, seen = torch.randn(48, 256, generator=torch.Generator().manual_seed(0)), rows(2000, 256)
    nearest, found = both(weight, block, seen)
    errors = [float((seen @ (each.dequantised(torch.float32) - weight).T).norm()) for each in (nearest, found)]
    assert errors[1] < 0.7 * errors[0]
    share = found.scales / nearest.scales
    assert found.block == block and 0.5 < float(share.min()) < 0.9 < float(share.max()) < 1.001
    assert torch.equal(numbers_of(torch.float16, found.scales), found.scales)  # an engine multiplies by the same


def test_channels_that_no_row_has_are_rounded_to_nearest() -> None:
    weight, seen = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), rows(500, 64)
    seen[:, 5:9] = 0
    for each in (seen, torch.zeros(10, 64)):
        _, found = both(weight, 32, each)
        nearest = rounded_at(found.scales, weight)
        assert torch.equal(found.values[:, 5:9], nearest[:, 5:9])
        assert torch.equal(found.values, nearest) == (not each.any())


def test_fewer_rows_than_channels_are_enough() -> None:
    weight, seen = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)), rows(3, 128)
    nearest, found = both(weight, 32, seen)
    errors = [float((seen @ (each.dequantised(torch.float32) - weight).T).norm()) for each in (nearest, found)]
    assert errors[1] < 0.2 * errors[0]


# ---- in a model


@pytest.mark.parametrize("number_type", ["fp16", "bf16"])
def test_the_logits_of_a_model_are_nearer_than_with_rounding(number_type: str) -> None:
    changes = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256}
    wide = load_reference(tiny.config("llama", **LONG | changes), number_type, CPU, 0)
    found = {method: made(method, changes, number_type) for method in ("round", "gptq")}
    tokens = calibration.samples(found["gptq"], CalibrationConfig(samples=8, length=64), 0)
    with torch.no_grad():
        truth = wide(input_ids=tokens).logits
        errors = {n: float((each.model.float()(input_ids=tokens).logits - truth).norm()) for n, each in found.items()}
    assert errors["gptq"] < 0.8 * errors["round"]
    form = {n: {name: (w.kind, w.scales.shape) for name, w in each.quantised.items()} for n, each in found.items()}
    assert form["gptq"] == form["round"]


def test_layers_see_the_rows_of_the_model_as_it_was_and_those_that_the_rounded_layers_before_give(
    monkeypatch: Any,
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    real = gptq.rows_of
    monkeypatch.setattr(gptq, "rows_of", lambda *rows: (seen.append(rows), real(*rows))[1])
    loaded = made("gptq")
    assert len(seen) == 5  # of query, key and value; of the output; of gate and up; of down; of the head

    tokens = calibration.samples(loaded, CalibrationConfig(samples=8, length=64), 0)
    wide = load(tiny.config("llama", **LONG), "fp16", CPU, 0, lambda _: None)
    for model, rows in ((wide.model, seen[3][0]), (loaded.model, seen[3][1])):
        read, found = copy.deepcopy(model).float(), []
        down = {"down": read.get_submodule("model.layers.0.mlp.down_proj")}
        calibration.see_rows(read, down, [tokens], lambda _, given, found=found: found.append(given.flatten(0, -2)))
        torch.testing.assert_close(rows, found[0], rtol=5e-3, atol=5e-4)


def test_a_weight_is_aimed_at_what_it_answered_before() -> None:
    weight, before = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), rows(2000, 64)
    after = before + 0.3 * before.roll(1, 1)
    aimed = weight @ gptq.rows_of(before, after).aim
    errors = [float((after @ each.T - before @ weight.T).norm()) for each in (weight, aimed)]
    assert errors[1] < 0.1 * errors[0]


def test_a_table_that_the_head_shares_stays_int8() -> None:
    loaded = made("gptq", {"tie_word_embeddings": True})
    head = loaded.quantised["lm_head"]
    assert head.kind == "int8" and loaded.quantised["model.embed_tokens"] is head
    assert {each.kind for name, each in loaded.quantised.items() if "layers" in name} == {"int4"}


@pytest.mark.parametrize("called", [False, True])
def test_a_layer_that_not_every_row_calls_is_rounded_and_that_is_said(called: bool) -> None:
    loaded = load(tiny.config("llama", **LONG), "fp16", CPU, 0, lambda _: None)
    mlp, name = loaded.model.model.layers[0].mlp, "model.layers.0.mlp.spare"
    mlp.spare = nn.Linear(64, 32, bias=False, dtype=torch.float16)
    if called:
        mlp.register_forward_pre_hook(lambda each, given: (each.spare(given[0][:, :3]), None)[1])
    nearest = to_nearest(mlp.spare.weight, "int4", 32, torch.float16)
    found = rounded(loaded, "gptq")
    assert torch.equal(found.quantised[name].values, nearest.values)
    assert (
        found.notes[-1] == f"1 of 9 layers do not multiply every row of a text and are rounded to nearest, {name} first"
    )


def test_what_cannot_be_had_is_said_in_one_line() -> None:
    with pytest.raises(UserError, match=r"blocks of 64 do not divide the input 96 of .*; set quantize.block=32"):
        made("gptq", block=64)
    loaded = load(tiny.config("llama", **LONG), "fp16", CPU, 0, lambda _: None)
    loaded.model.model.layers[0].input_layernorm.weight[3] = torch.nan
    with pytest.raises(RunError, match=r"the rows of model.layers.0.self_attn.q_proj are not finite on the text"):
        rounded(loaded, "gptq")


@pytest.mark.slow
def test_a_real_models_perplexity_rises_by_a_tenth_at_most(smollm2: LoadedModel) -> None:
    asked = QuantizeConfig(method="gptq", block=32, calibration=CalibrationConfig(samples=16))
    wide = copy.deepcopy(smollm2.model).float()
    found = quantised(replace(smollm2, model=copy.deepcopy(smollm2.model)), "int4_weights", "fp16", asked, 0, print)
    small = found.model.float()  # a CPU emulates fp16
    what = Scored("graph", lambda tokens: small(input_ids=tokens, use_cache=False).logits, 1, 512, 512)
    cost = cost_of(what, wide, real_text(None, smollm2, 2001), lambda *_: None)
    assert 0 < cost.increase.value < 0.1
