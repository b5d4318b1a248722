"""Models whose layers keep states beside the keys of every token, or instead: they generate like any other."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import DONE, GPU, do
from test_chunks import ragged
from test_ring_chunks import Made, over
from tiny import CPU, tokens
from torch import Tensor

from benchmarks.families import described
from passes.errors import RunError, UserError
from pipeline.config.schema import CacheConfig, ModelConfig, ShapeConfig, StrategyConfig
from pipeline.engine import programs
from pipeline.model.load import LoadedModel, load
from pipeline.trace.cache_shape import CacheShape
from pipeline.trace.call_form import CallForm, trace
from pipeline.verify.candidate import open_generator

LONGEST = 400
GENERATE = [
    "cache=in_engine", "benchmark=generate", "shape.max=200", "benchmark.generate.input_length=150",
    "benchmark.generate.output_length=8", "benchmark.min_generations=3", "benchmark.min_seconds=0.1",
]  # fmt: skip
# a short convolution beside attention, two that recur in its stead, both in one layer, and a layer of neither
FAMILIES = ["lfm2", "granitemoehybrid", "qwen3_next", "falcon_h1", "nemotron_h"]
NO_ATTENTION = "mamba2"


def form_of(name: str) -> ModelConfig:
    architecture = described(name) | {"max_position_embeddings": 512, "vocab_size": 128}
    return ModelConfig(name, weights="random", inputs=["input_ids"], logits="last", architecture=architecture)


@functools.cache
def loaded(name: str) -> LoadedModel:
    return load(form_of(name), "fp32", CPU, 0, lambda _: None)


@functools.cache
def made(name: str, batch: int = 1, mode: str = "in_engine", chunk: int | None = None) -> Made:
    return over(loaded(name), form_of(name), CacheConfig(mode, LONGEST, chunk), batch, StrategyConfig("detect_causal"))


def cache_of(name: str, mode: str = "in_engine", batch: int = 1, chunk: int | None = None) -> CacheShape:
    asked, shape = CacheConfig(mode, LONGEST, chunk), ShapeConfig("dynamic", batch, 2, 300, 300)
    cache = programs.cache_of(loaded(name).model, asked, shape, None)
    assert cache is not None
    return cache


def expected(name: str, row: Tensor, decoded: int) -> Tensor:
    """Logits [1, decoded + 1, vocabulary] behind the last tokens of ``row`` [length], in one pass without a cache."""
    with torch.no_grad():
        found: Any = loaded(name).model(input_ids=row.unsqueeze(0))
    return found.logits[:, -decoded - 1 :]


def greedy(name: str, row: Tensor, new_tokens: int) -> list[int]:
    """The likeliest tokens behind ``row`` [length], each by the model over everything before it."""
    text = row
    for _ in range(new_tokens):
        text = torch.cat([text, expected(name, text, 0)[0, -1:].argmax(-1)])
    return text[len(row) :].tolist()


@pytest.mark.parametrize("name", [*FAMILIES, NO_ATTENTION])
def test_logits_are_those_of_the_whole_sequence_at_every_length(name: str) -> None:
    """Prompts of no full chunk, of one and of two, with and without tokens behind them; one after another, so that a
    state that stayed would be seen."""
    generator = made(name)[2]
    for length, decoded in [(260, 4), (3, 2), (128, 0), (135, 7), (384, 128), (40, 0)]:
        ids = tokens(1, length, seed=length)
        found = generator.forced_logits(ids, None, decoded)
        torch.testing.assert_close(found, expected(name, ids[0], decoded), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_generated_is_the_models_own_choice(name: str) -> None:
    generator = made(name)[2]
    for length in (133, 6):
        (row,) = tokens(1, length, seed=length)
        assert generator.generate(row.unsqueeze(0), 12) == [greedy(name, row, 12)]


@pytest.mark.parametrize("name", ["lfm2", "granitemoehybrid"])
def test_padding_runs_through_no_state(name: str) -> None:
    generator, blank = made(name)[2], 11
    ids = tokens(1, 150)
    padding = torch.arange(150).unsqueeze(0) < blank
    found = generator.forced_logits(ids, padding, 5)
    torch.testing.assert_close(found, expected(name, ids[0, blank:], 5), rtol=1e-4, atol=1e-5)
    assert generator.generate(ids, 6, padding) == [greedy(name, ids[0, blank:], 6)]


@pytest.mark.parametrize("mode", ["in_engine", "static"])
def test_rows_of_a_batch_keep_the_columns_behind_which_each_ends(mode: str) -> None:
    """Shorter than a convolution's kernel, longer, and as long as the batch."""
    lengths = (40, 9, 8, 23)
    ids, padding = ragged(lengths)
    logits = made("lfm2", len(lengths), mode)[2].forced_logits(ids, padding, 7)
    for row, length in enumerate(lengths):
        wanted = expected("lfm2", ids[row, -length:], min(7, length - 1))
        torch.testing.assert_close(logits[row : row + 1, -wanted.shape[1] :], wanted, rtol=1e-4, atol=1e-5)


def test_a_convolution_may_run_in_chunks_and_need_not() -> None:
    assert made("lfm2")[0].chunk is None
    cache, rewritten, generator = made("lfm2", chunk=128)
    assert cache.chunk == 128 and not [spec for spec in rewritten["engine"].inputs if spec.max > LONGEST + 128]
    ids = tokens(1, 290)
    torch.testing.assert_close(generator.forced_logits(ids, None, 3), expected("lfm2", ids[0], 3), rtol=1e-4, atol=1e-5)


def test_a_cache_says_of_each_layer_what_it_keeps_and_is_read_from_a_manifest() -> None:
    hybrid, both = cache_of("granitemoehybrid"), cache_of("falcon_h1")
    assert hybrid.attends and len(hybrid.layers) == sum(hybrid.attends) < len(hybrid.attends)
    assert {state.layer for state in hybrid.states} == {i for i, attends in enumerate(hybrid.attends) if not attends}
    assert both.attends == () and {state.kind for state in both.states} == {"conv", "recurrent"}
    assert (hybrid.chunk, hybrid.steps, cache_of("lfm2").steps) == (128, 2, 2)
    for cache in (hybrid, both, cache_of("lfm2")):
        manifest = json.loads(json.dumps(asdict(cache) | {"dtype": "float32"}))
        assert CacheShape.of(manifest) == cache


def test_keys_are_updated_where_they_lie_and_states_change_places() -> None:
    cache = cache_of("falcon_h1")
    first, second = cache.turns(CPU)
    count = 2 * len(cache.layers)
    assert all(a is b for a, b in zip(first[:count], second[:count], strict=True))
    assert not any(a is b for a, b in zip(cache.states_in(first), cache.states_in(second), strict=True))


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("granitemoehybrid", {"batch": 2}, r"shape.batch=2: .* padding of shorter rows; set shape.batch=1"),
        ("lfm2", {"batch": 2, "chunk": 128}, r"shape.batch=2: .* padding of shorter rows; leave out cache.chunk"),
        ("granitemoehybrid", {"mode": "static"}, r"cache=static: .* recurrent layers, .*; set cache=in_engine"),
        (
            "deepseek_v32",
            {},
            r"cache=in_engine: DynamicIndexedLayer .* keeps other things than every token's keys; set cache=none",
        ),
    ],
    ids=["ragged", "ragged chunks", "static", "an index"],
)
def test_what_a_state_cannot_do_is_refused_in_one_line(name: str, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        cache_of(name, **asked)


def test_a_model_that_forgets_its_states_over_several_tokens_is_refused() -> None:
    """transformers' Mamba begins anew with each call of more than one token."""
    with pytest.raises(RunError, match="for the begin of a text, whatever its states are"):
        made("mamba")


def test_a_recurrent_prompt_of_a_range_of_lengths_names_what_would_help() -> None:
    form, model = form_of("granitemoehybrid"), loaded("granitemoehybrid").model
    with pytest.raises(RunError, match="try shape=static, which is one length"):
        trace(CallForm(model, "last"), form, ShapeConfig("dynamic", 1, 2, 32, 64), CPU)
    program = trace(CallForm(model, "last"), form, ShapeConfig("static", 1, 64, 64, 64), CPU).program
    ids = tokens(1, 64)
    torch.testing.assert_close(
        program.module()(input_ids=ids), expected("granitemoehybrid", ids[0], 0), rtol=1e-4, atol=1e-5
    )


def saved(name: str, tmp_path: Path) -> Path:
    folder = tmp_path / name
    loaded(name).model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    ["lfm2", "granitemoehybrid", *(pytest.param(each, marks=pytest.mark.slow) for each in ("falcon_h1", "qwen3_next"))],
)
def test_a_run_builds_both_engines_and_the_next_finds_them(name: str, store: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path)
    asked = [*GENERATE, "store.enabled=true", f"store.folder={tmp_path}/engines"]
    first = do(store, tmp_path / "first", folder, *asked)
    assert (first.report["status"], first.report["failure"]) == (DONE, None)
    assert first.report["verify"]["generation"]["cases"][0]["tokens"] == 8
    held = CacheShape.of(json.loads((first.folder / "engine.json").read_text())["cache"])
    assert held.states and held.steps == 2
    again = do(store, tmp_path / "again", folder, *asked)
    assert again.report["store"]["hit"] and again.report["failure"] is None
    assert CacheShape.of(json.loads((again.folder / "decode.json").read_text())["cache"]) == held


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no NVIDIA GPU that PyTorch can use")
@pytest.mark.parametrize("name", ["lfm2", "granitemoehybrid", "falcon_h1", "qwen3_next"])
def test_engines_take_turns_and_a_prompt_behind_another_sees_nothing_of_it(
    name: str, store: str, tmp_path: Path
) -> None:
    outcome = do(store, tmp_path / "out", saved(name, tmp_path), *GENERATE)
    assert (outcome.report["status"], outcome.report["failure"]) == ("ok", None)
    assert outcome.report["verify"]["executed"] == "engine"
    assert outcome.report["benchmark"]["generate"]["cuda_graph"] is True
    generator = open_generator(outcome.folder)
    prompts = [tokens(1, length, seed=length).cuda() for length in (133, 6, 128)]
    written = [generator.generate(prompt, 9) for prompt in prompts]
    assert [generator.generate(prompt, 9) for prompt in reversed(prompts)] == written[::-1]
