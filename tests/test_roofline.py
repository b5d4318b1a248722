"""The least time that a prompt can take."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_prompts import measured, simulated

from pipeline.measure.ceilings import Ceilings
from pipeline.measure.roofline import DecoderCost, decoder_cost, prefill_bytes, prefill_floor_s, prefill_flops

TINY = DecoderCost(
    2,
    8,
    (None,),
    layer_parameters=1000,
    lm_head_parameters=500,
    all_logits=False,
    bytes_per_parameter=2,
    key_value_heads=1,
)


@settings(deadline=None)
@given(length=st.integers(1, 40), window=st.none() | st.integers(1, 50), batch=st.integers(1, 3))
def test_attention_operations_are_those_of_the_pairs_under_the_mask(
    length: int, window: int | None, batch: int
) -> None:
    query, key = np.mgrid[:length, :length]
    pairs = int(((key <= query) & (query - key < (window or length))).sum())
    cost = replace(TINY, windows=(window,), layer_parameters=0, lm_head_parameters=0)
    assert prefill_flops(cost, batch, length) == 4 * 8 * 2 * batch * pairs


def test_logits_are_counted_for_the_positions_that_are_wanted() -> None:
    last = prefill_flops(TINY, 1, 10)
    every = prefill_flops(replace(TINY, all_logits=True), 1, 10)
    assert every - last == 2 * 500 * 9


def test_the_floor_is_the_longer_of_reading_and_computing() -> None:
    assert prefill_floor_s(TINY, 1, 1, copy_gb_per_s=1e-6, matmul_tflops=1.0) == pytest.approx(3000 / 1e3)
    assert prefill_floor_s(TINY, 1, 1, copy_gb_per_s=1e6, matmul_tflops=1e-9) == pytest.approx((3000 + 4 * 16) / 1e3)


@pytest.mark.parametrize("tied", [True, False])
def test_the_cost_of_a_model_counts_products_and_not_embeddings(tied: bool) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 50, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**sizes, **heads, tie_word_embeddings=tied), dtype=torch.float16
        )
    cost = decoder_cost(model, "last")
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96  # q and o; k and v; gate, up and down
    assert cost == DecoderCost(4, 16, (None,) * 3, 3 * layer, 50 * 64, False, 2, 2)
    assert prefill_bytes(cost) == 2 * (3 * layer + 50 * 64)


def test_windows_are_taken_layer_by_layer_from_the_models_config() -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config

    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 50, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(**sizes, **heads, use_sliding_window=True, sliding_window=7, max_window_layers=2)
    with torch.device("meta"):
        cost = decoder_cost(AutoModelForCausalLM.from_config(config), "all")
    assert cost is not None and cost.windows == (None, None, 7)


def test_a_mixture_of_experts_has_no_roofline() -> None:
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        hidden_size=32, intermediate_size=32, vocab_size=50, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        assert decoder_cost(AutoModelForCausalLM.from_config(config), "last") is None


def test_the_roofline_fraction_is_the_floor_over_device_time() -> None:
    ceilings = Ceilings(copy_gb_per_s=1e6, matmul_tflops={"bf16": 1e-3})
    report = measured(simulated(), cost=TINY, ceilings=ceilings, precision="bf16").report
    floor_ms = 1e3 * prefill_flops(TINY, 1, 2048) / 1e9
    assert report["prefill"]["floor_ms"] == pytest.approx(floor_ms)
    assert report["prefill"]["roofline_fraction"] == pytest.approx(floor_ms / 5.0)
    assert report["ceilings"] == {"copy_gb_per_s": 1e6, "matmul_tflops": {"bf16": 1e-3}}
    assert measured(simulated()).report["prefill"]["roofline_fraction"] is None
