"""GPTQ against the algorithm as its paper writes it, and against rounding, where rows are what rows of models are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import model_config
from test_few_bits import CPU, form
from torch import Tensor, nn

from passes.errors import RunError
from passes.quantised import QuantisedWeight, to_nearest
from pipeline.config.quantize import CalibrationConfig, QuantizeConfig
from pipeline.model import calibration, gptq
from pipeline.model.load import LoadedModel, load
from pipeline.model.quantise import quantised
from pipeline.model.real_text import real_text

BLOCK = 32


def layer(outputs: int = 24, inputs: int = 320) -> tuple[Tensor, Tensor]:
    """A weight, and rows that it is multiplied with: some channels are larger, and neighbours go together."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2048, inputs, generator=generator)
    rows = rows + 2 * rows.roll(1, 1) + 0.5 * rows[:, :1]
    rows[:, ::17] *= 8
    return torch.randn(outputs, inputs, generator=generator), rows


def form_of(rows: Tensor) -> Tensor:
    return gptq._Rows().form("a layer", rows)


def lost(made: QuantisedWeight, weight: Tensor, rows: Tensor) -> float:
    return float((rows @ (made.dequantised(torch.float32) - weight).T).norm() / (rows @ weight.T).norm())


def column_by_column(weight: Tensor, form: Tensor, scales: Tensor) -> Tensor:
    """The values, where after each column the inverse of what is left is computed anew (equation 2 of the paper)."""
    order = form.diagonal().float().argsort(descending=True, stable=True).tolist()
    left, values = weight.double().clone(), torch.zeros_like(weight, dtype=torch.int8)
    while order:
        inverse = torch.linalg.inv(form[order][:, order])
        now, *later = order
        scale = scales[:, now // BLOCK].double()
        values[:, now] = (left[:, now] / scale).round().clamp(-8, 7).to(torch.int8)
        error = (left[:, now] - values[:, now] * scale) / inverse[0, 0]
        left[:, later] -= error[:, None] * inverse[0, 1:]
        order = later
    return values


def test_it_is_the_papers_algorithm_whatever_runs_at_once() -> None:
    weight, rows = layer()
    form = form_of(rows)
    made = gptq.in_int4(weight, form, BLOCK, torch.float16)
    wanted = column_by_column(weight, form, made.scales)

    differing = int((made.values != wanted).sum())  # where float32 and float64 round a half to other sides
    assert differing <= 0.002 * weight.numel()
    assert made.block == BLOCK


def test_outputs_lose_less_than_by_rounding_each_weight() -> None:
    weight, rows = layer()
    made = gptq.in_int4(weight, form_of(rows), BLOCK, torch.float16)
    assert lost(made, weight, rows) < 0.6 * lost(to_nearest(weight, "int4", BLOCK, torch.float16), weight, rows)


def test_channels_of_which_no_row_has_anything_change_nothing_for_the_others() -> None:
    weight, rows = layer()
    rows[:, 40:80] = 0
    made = gptq.in_int4(weight, form_of(rows), BLOCK, torch.float16)
    assert lost(made, weight, rows) < 0.6 * lost(to_nearest(weight, "int4", BLOCK, torch.float16), weight, rows)
    nothing = gptq.in_int4(weight, form_of(torch.zeros(9, weight.shape[1])), BLOCK, torch.float16)
    scaled = weight.unflatten(1, (-1, BLOCK)) / nothing.scales[..., None]
    assert torch.equal(nothing.values, scaled.flatten(1).round().clamp(-8, 7).to(torch.int8)), "each to its nearest"


def made_by(method: str | None, number_type: str = "fp16", **changes: Any) -> LoadedModel:
    loaded = load(form(**changes), number_type, CPU, 0, lambda _: None)
    if method is None:
        return loaded
    asked = QuantizeConfig(method=method, block=BLOCK, calibration=CalibrationConfig(samples=4, length=64))
    return quantised(loaded, "int4_weights", number_type, asked, 0, lambda _: None)


@pytest.mark.parametrize("number_type", ["fp16", "bf16"])
def test_a_models_logits_lose_less_and_the_model_before_is_left_alone(number_type: str) -> None:
    exact = made_by(None, number_type)
    before = {name: each.clone() for name, each in exact.model.state_dict().items()}
    plain, found = made_by("round", number_type), made_by("gptq", number_type)
    tokens = calibration.texts(exact, CalibrationConfig(samples=4, length=64), 0)
    with torch.no_grad():
        truth, *others = (each.model.float()(input_ids=tokens).logits for each in (exact, plain, found))
    rounded, optimised = (float((each - truth).norm()) for each in others)
    assert optimised < 0.9 * rounded
    assert found.quantised.keys() == plain.quantised.keys()
    assert not any("reached" in note for note in found.notes)
    assert all(torch.equal(each, before[name].float()) for name, each in exact.model.state_dict().items())


def test_a_layer_that_no_row_reaches_is_rounded_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gptq.optimised

    def beside_an_idle_expert(model: Any, layers: dict[str, nn.Linear], *others: Any) -> dict[str, QuantisedWeight]:
        found = real(model, layers, *others)
        return {name: each for name, each in found.items() if not name.endswith("down_proj")}

    monkeypatch.setattr(gptq, "optimised", beside_an_idle_expert)
    found, plain = made_by("gptq"), made_by("round")
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(found.quantised[name].values, plain.quantised[name].values)
    assert f"no row of the text reached {name}: rounded to the nearest" in found.notes


def test_rows_that_are_no_numbers_are_refused_by_the_layers_name() -> None:
    loaded = made_by(None)
    loaded.model.model.layers[0].input_layernorm.weight[3] = float("inf")
    asked = QuantizeConfig(method="gptq", block=BLOCK, calibration=CalibrationConfig(samples=1, length=8))
    with pytest.raises(RunError, match=r"the rows of .*q_proj are not finite"):
        quantised(loaded, "int4_weights", "fp16", asked, 0, lambda _: None)


def test_the_text_is_none_on_which_quality_is_measured_and_begins_as_the_model_wants(smollm2: LoadedModel) -> None:
    judged, other = (real_text(None, smollm2, 1000, behind=behind) for behind in (False, True))
    assert judged.sha256 != other.sha256 and not torch.equal(judged.tokens[:1000], other.tokens[:1000])
    rows = calibration.texts(smollm2, CalibrationConfig(samples=3, length=50), 0)
    assert rows.shape == (3, 50) and len({tuple(row.tolist()) for row in rows}) == 3


@pytest.mark.slow
def test_int4_raises_the_perplexity_of_a_real_model_by_less_than_a_tenth() -> None:
    loaded = load(model_config("smollm2_135m"), "fp32", CPU, 0, lambda _: None)
    text = real_text(None, loaded, 2048).tokens[:2048].view(4, 512)

    def perplexity() -> float:
        with torch.no_grad():
            logits = loaded.model(input_ids=text).logits[:, :-1].flatten(0, 1)
        return float(nn.functional.cross_entropy(logits, text[:, 1:].flatten()).exp())

    before = perplexity()
    quantised(loaded, "int4_weights", "fp16", QuantizeConfig(method="gptq", block=32), 0, lambda _: None)
    assert perplexity() < 1.1 * before
