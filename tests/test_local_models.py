"""Models that people run whose layers see a window or a chunk: blocks are what PyTorch makes of them, and are built."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tiny import CPU, SIZES, tokens

from passes.graph.rewrite import rewrite
from passes.graph.rewritten import Rewritten
from pipeline.config.schema import ModelConfig, ShapeConfig
from pipeline.model.load import load
from pipeline.trace.call_form import CallForm, Traced, trace

WIDTH, LONGEST = 150, 500
"""More than a block, and so that a prompt has several blocks."""
HEADS = {"head_dim": 16, "max_position_embeddings": 1024}
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WIDTH},
    "gemma3_text": {
        "sliding_window": WIDTH, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16, "num_key_value_heads": 1,
    },
    "llama4_text": {
        "attention_chunk_size": WIDTH, "num_hidden_layers": 2, "no_rope_layers": [1, 0],
        "attn_temperature_tuning": False,  # which is 1 below 8192 tokens
        "layer_types": ["chunked_attention", "full_attention"], "moe_layers": [], "intermediate_size_mlp": 96,
    },
}  # fmt: skip
ACTIONS = {
    "mistral": ["native_window"],
    "gemma3_text": ["native_window", "native_causal"],
    "llama4_text": ["native_chunks", "native_causal"],
}


def config(name: str) -> ModelConfig:
    architecture = {**SIZES, **HEADS, **MODELS[name], "model_type": name}
    return ModelConfig(name, weights="random", inputs=["input_ids"], logits="all", architecture=architecture)


@functools.cache
def model(name: str, precision: str = "fp32") -> Any:
    return load(config(name), precision, CPU, 0, lambda _: None).model


def traced(name: str, least: int, precision: str = "fp32", batch: int = 1) -> Traced:
    kind = "static" if least == LONGEST else "dynamic"
    shape = ShapeConfig(kind, batch, least, LONGEST, LONGEST)
    return trace(CallForm(model(name, precision), "all"), config(name), shape, CPU)


def rewritten(name: str, least: int, **how: Any) -> Rewritten:
    return rewrite(traced(name, least, **how).program, "detect_causal", "mask")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["gemma3_text", *(pytest.param(name, marks=SLOW) for name in ("mistral", "llama4_text"))]
)
def test_a_prompt_in_blocks_is_what_pytorch_computes_below_at_and_above_the_window(name: str) -> None:
    made = rewritten(name, 1)
    assert [call.action for call in made.calls] == ACTIONS[name]
    run = made.program.module()
    for length in (1, WIDTH - 1, WIDTH, WIDTH + 1, 2 * WIDTH, LONGEST):
        ids = tokens(1, length, seed=length)
        with torch.no_grad():
            torch.testing.assert_close(run(input_ids=ids), model(name)(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["llama4_text", *(pytest.param(name, marks=SLOW) for name in ("mistral", "gemma3_text"))]
)
def test_so_is_one_of_a_single_length_and_of_several_rows(name: str) -> None:
    made = rewritten(name, LONGEST, batch=2)
    assert [call.action for call in made.calls] == ACTIONS[name]
    ids = tokens(2, LONGEST)
    with torch.no_grad():
        wanted = model(name)(input_ids=ids).logits
        torch.testing.assert_close(made.program.module()(input_ids=ids), wanted, rtol=1e-4, atol=1e-5)
