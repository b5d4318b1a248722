"""A layer with a window keeps the latest tokens alone, where that is proved: what is generated stays the same."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import network_in_torch
import pytest
import tiny
import torch
from runs import DONE, GPU, do
from test_local_attention import interpreted
from test_local_models import HEADS, MODELS
from tiny import CPU, SIZES, tokens
from torch import Tensor

from passes.graph import cache_ops
from passes.graph.rewrite import rewrite
from passes.graph.rewritten import Rewritten
from pipeline.config.schema import CacheConfig, ModelConfig, ShapeConfig
from pipeline.engine import programs
from pipeline.engine.session import GraphSession
from pipeline.generate.with_cache import CachedGenerator
from pipeline.model.load import load
from pipeline.trace.cache_shape import CacheShape

LONGEST = 300


def architecture(name: str, width: int) -> dict[str, Any]:
    changes = {key: width for key in ("sliding_window", "attention_chunk_size") if key in MODELS[name]}
    return {**SIZES, **HEADS, **MODELS[name], **changes, "model_type": name}


@functools.cache
def model(name: str, width: int) -> Any:
    described = architecture(name, width)
    config = ModelConfig(name, weights="random", inputs=["input_ids"], logits="last", architecture=described)
    return load(config, "fp32", CPU, 0, lambda _: None).model


@functools.cache
def made(
    name: str, width: int, mode: str = "in_engine", batch: int = 1
) -> tuple[CacheShape, dict[str, Rewritten], Any]:
    lm, shape = model(name, width), ShapeConfig("dynamic", batch, 2, 64, 200)
    form = ModelConfig(name, weights="random", inputs=["input_ids"], logits="last", architecture={})
    whole = programs.cache_of(lm, CacheConfig(mode, capacity=LONGEST), shape, None)
    cache, parts = programs.with_rings(lm, form, shape, whole)
    assert cache is not None
    traced = {part: trace() for part, trace in parts.items()}
    rewritten = {part: rewrite(each.program, "detect_causal", "mask") for part, each in traced.items()}
    sessions = {
        part: GraphSession(rewritten[part].program.module(), tuple(spec.name for spec in each.inputs))
        for part, each in traced.items()
    }
    decode = sessions["decode"]
    turns = [decode] if mode == "in_engine" else [decode, GraphSession(decode._graph, decode._inputs)]
    return cache, rewritten, CachedGenerator(sessions["engine"], turns, cache, SIZES["vocab_size"], CPU)


def test_layers_with_a_window_keep_it_and_the_others_keep_every_token() -> None:
    cache, rewritten, _ = made("gemma3_text", 100)
    assert cache.capacity == 384 and cache.rings == (128, None)
    assert [(call.mask, call.action) for call in rewritten["decode"].calls] == [
        ("ring", "cached"),
        ("causal_offset", "cached"),
    ]


def test_a_ring_of_a_whole_window_needs_no_more_than_the_position() -> None:
    cache, rewritten, _ = made("mistral", 128, "static")
    assert cache.rings == (128,)
    assert [(call.mask, call.action) for call in rewritten["decode"].calls] == [("causal_offset", "cached")]


def test_a_window_as_long_as_the_cache_keeps_every_token() -> None:
    assert made("mistral", 384)[0].rings == (None,)


def test_a_step_of_which_no_ring_was_proved_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of the model's own begin anew: no number of the latest tokens is all that is seen."""
    traced, export = [], torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *given, **how: traced.append(given) or export(*given, **how))
    cache, _, _ = made("llama4_text", 100)
    assert cache.rings == (None, None) and len(traced) == 2, "a step and a prompt"


QUICK = [("gemma3_text", 100, "in_engine"), ("mistral", 128, "static")]
OTHERS = [("gemma3_text", 100, "static"), ("mistral", 128, "in_engine")]


@pytest.mark.parametrize(
    ("name", "width", "mode"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS)]
)
@pytest.mark.parametrize(("length", "decoded"), [(40, 30), (140, 60), (290, 120), (200, 1)])
def test_logits_through_a_ring_are_those_of_the_whole_sequence(
    name: str, width: int, mode: str, length: int, decoded: int
) -> None:
    _, _, generator = made(name, width, mode)
    ids = tokens(1, length, seed=length)
    with torch.no_grad():
        wanted = model(name, width)(input_ids=ids).logits[:, length - 1 - decoded :]
    torch.testing.assert_close(generator.forced_logits(ids, None, decoded), wanted, rtol=1e-4, atol=1e-5)


def test_rows_of_different_lengths_leave_each_its_own_last_tokens() -> None:
    _, _, generator = made("gemma3_text", 100, batch=3)
    lengths, decoded = (30, 230, 150), 40
    ids, padding = tokens(3, 230), torch.arange(230) < 230 - torch.tensor(lengths).unsqueeze(1)
    logits = generator.forced_logits(ids, padding, decoded)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            alone = model("gemma3_text", 100)(input_ids=ids[row : row + 1, 230 - length :]).logits
        alone = alone[:, -min(length, decoded + 1) :]
        torch.testing.assert_close(logits[row : row + 1, -alone.shape[1] :], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [None, 100, 128])
def test_the_layers_of_a_step_see_what_the_position_says(width: int | None) -> None:
    """Over a cache that was written round, and before it was."""

    def step(query: Tensor, key: Tensor, value: Tensor, position: Tensor) -> Tensor:
        return cache_ops.cached(query, key, value, position, 0.3, width)

    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 1, 16), (2, 2, 128, 16), (2, 2, 128, 16)
    inputs = [*(torch.randn(shape, generator=generator) for shape in shapes), torch.tensor([0, 0])]
    made, _ = interpreted(tiny.program_of(step, *inputs), inputs, [False] * 4)
    round_about = () if width is None else ((128, 250), (383, 1000), (2**31, 131071))
    for positions in ((0, 1), (99, 100), (101, 127), *round_about):
        inputs[3] = torch.tensor(positions)
        (out,) = network_in_torch.run(made.ctx.net, inputs)
        torch.testing.assert_close(out, step(*inputs), rtol=1e-5, atol=1e-5)


RUNS = {
    "a ring": ("gemma3_text", 100, ["cache=in_engine"]),
    "a ring of a whole window": ("mistral", 128, ["cache=static"]),
    "rings of several rows": ("mistral", 100, ["cache=in_engine", "shape.batch=3"]),
    "chunks": ("llama4_text", 100, ["cache=in_engine"]),
}


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_a_whole_run_verifies_texts_that_are_longer_than_the_window(name: str, store: str, tmp_path: Path) -> None:
    family, width, overrides = RUNS[name]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(architecture(family, width)))
    settings = [
        "model.weights=random",
        "benchmark=none",
        "shape.max=200",
        "shape.opt=64",
        "cache.capacity=384",
        *overrides,
    ]
    report = do(store, tmp_path / "outputs", tmp_path / "model", *settings).report
    assert (report["status"], report["failure"]) == (DONE, None)
    assert report["verify"]["passed"] and report["verify"]["executed"] == ("engine" if GPU else "graph")
    assert max(case["length"] for case in report["verify"]["cases"]) == 384
