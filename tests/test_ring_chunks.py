"""Prompts in chunks over a cache whose layers with a window keep the latest tokens alone."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import network_in_torch
import pytest
import tiny
import torch
from conftest import model_config
from runs import DONE, GPU, do
from test_chunks import ragged
from test_local_attention import interpreted
from test_local_models import HEADS
from tiny import CPU, SIZES, program_of, tokens
from torch import Tensor

from passes.graph.cache_ops import UPDATE, cache_read
from passes.graph.local_attention import WINDOWED
from passes.graph.rewrite import in_aten
from pipeline.config.schema import CacheConfig, ModelConfig, ShapeConfig, StrategyConfig
from pipeline.engine import programs
from pipeline.generate.with_cache import CachedGenerator
from pipeline.model.load import LoadedModel, load
from pipeline.model.text import token_batch
from pipeline.trace.cache_shape import CacheShape
from pipeline.trace.largest import at_most
from pipeline.verify.candidate import graph_generator, vocabulary_of

CHUNK, LONGEST = 128, 700
HYBRID = ["sliding_attention", "full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "num_hidden_layers": 2, "layer_types": HYBRID, "query_pre_attn_scalar": 16, "num_key_value_heads": 1,
    },
    "mistral": {},
}  # fmt: skip


def architecture(name: str, width: int) -> dict[str, Any]:
    return {**SIZES, **HEADS, **MODELS[name], "sliding_window": width, "model_type": name}


Made = tuple[CacheShape, dict[str, programs.Program], CachedGenerator]


def form_of(name: str, width: int) -> ModelConfig:
    described = architecture(name, width)
    return ModelConfig(name, weights="random", inputs=["input_ids"], logits="last", architecture=described)


@functools.cache
def loaded(name: str, width: int) -> LoadedModel:
    return load(form_of(name, width), "fp32", CPU, 0, lambda _: None)


@functools.cache
def made(name: str, width: int, batch: int = 1, chunk: int = CHUNK, strategy: str = "detect_causal") -> Made:
    asked = CacheConfig("in_engine", LONGEST, chunk)
    return over(loaded(name, width), form_of(name, width), asked, batch, StrategyConfig(strategy))


def over(lm: LoadedModel, form: ModelConfig, asked: CacheConfig, batch: int, strategy: StrategyConfig) -> Made:
    """The cache of ``lm`` that is ``asked`` for, and what fills it and generates with it."""
    shape = ShapeConfig("dynamic", batch, 2, 600, 600)
    cache, parts = programs.with_rings(lm.model, form, shape, programs.cache_of(lm.model, asked, shape, None))
    assert cache is not None
    rewritten = {part: programs.rewritten(trace(), strategy) for part, trace in parts.items()}
    return cache, rewritten, graph_generator(rewritten, cache, vocabulary_of(lm), "fp32")


def expected(name: str, width: int, row: Tensor, decoded: int) -> Tensor:
    """Logits [1, decoded + 1, vocabulary] behind the last tokens of ``row`` [length], in one pass without a cache."""
    with torch.no_grad():
        found: Any = loaded(name, width).model(input_ids=row.unsqueeze(0))
    return found.logits[:, -decoded - 1 :]


LENGTHS = [(45, 40), (128, 3), (135, 7), (260, 4), (391, 20), (513, 129), (640, 5), (700, 180)]
"""Of a text, and how many of its tokens run one by one behind the prompt."""
WIDTHS = [("gemma3_text", 100, 128), ("mistral", 200, 128), ("mistral", 100, 384)]


@pytest.mark.parametrize(("name", "width", "chunk"), WIDTHS)
def test_logits_are_those_of_the_whole_sequence_at_every_length(name: str, width: int, chunk: int) -> None:
    cache, _, generator = made(name, width, chunk=chunk)
    assert cache.rings[0] == -(-width // 128) * 128 and cache.chunk == chunk
    for length, decoded in LENGTHS:
        ids = tokens(1, length, seed=length)
        found = generator.forced_logits(ids, None, decoded)
        torch.testing.assert_close(found, expected(name, width, ids[0], decoded), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "width"), [("gemma3_text", 100), pytest.param("mistral", 200, marks=pytest.mark.slow)]
)
def test_rows_that_end_in_different_chunks_keep_each_its_own_ring(name: str, width: int) -> None:
    """What follows a row in its last chunk, and in the chunks of longer rows, would lie where its latest tokens are."""
    lengths, decoded = (640, 45, 171, 300, 424, 168), 40
    ids, padding = ragged(lengths)
    logits = made(name, width, batch=len(lengths))[2].forced_logits(ids, padding, decoded)
    for row, length in enumerate(lengths):
        wanted = expected(name, width, ids[row, -length:], decoded)
        torch.testing.assert_close(logits[row : row + 1], wanted, rtol=1e-4, atol=1e-5)


def test_a_prompt_behind_another_sees_nothing_of_it() -> None:
    _, _, generator = made("gemma3_text", 100)
    for length in (690, 30, 260):
        ids = tokens(1, length, seed=length)
        found = generator.forced_logits(ids, None, 5)
        torch.testing.assert_close(found, expected("gemma3_text", 100, ids[0], 5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["decompose", pytest.param("lowering", marks=pytest.mark.slow)])
def test_so_with_every_strategy(strategy: str) -> None:
    _, _, generator = made("gemma3_text", 100, strategy=strategy)
    for length, decoded in ((135, 7), (640, 5)):
        ids = tokens(1, length, seed=length)
        found = generator.forced_logits(ids, None, decoded)
        torch.testing.assert_close(found, expected("gemma3_text", 100, ids[0], decoded), rtol=1e-4, atol=1e-5)


def test_a_layer_with_a_ring_sees_its_window_in_blocks_and_holds_no_more_of_a_longer_text() -> None:
    cache, rewritten, _ = made("gemma3_text", 100)
    assert (cache.capacity, cache.rings, cache.near) == (768, (128, None), 256)
    chunk = rewritten["engine"]
    assert [(call.mask, call.proof, call.action) for call in chunk.attention.calls] == [
        ("sliding_window", "proved", "native_window"),
        ("causal_lower_right", "proved", "native_causal"),
    ]
    assert [spec.name for spec in chunk.inputs if spec.dynamic] == ["places", "near"]
    (near,) = (spec for spec in chunk.inputs if spec.name == "near")
    assert (near.min, near.max) == (CHUNK, 256)
    graph = chunk.program.graph
    (layer,) = graph.find_nodes(op="call_function", target=WINDOWED)
    assert at_most(layer) <= 4 * 2 * CHUNK * 16, "of the blocks, whatever the capacity"
    assert [node.meta["val"].shape[2] for node in graph.find_nodes(op="call_function", target=UPDATE)] == [
        128, 128, 768, 768,
    ]  # fmt: skip


@pytest.mark.parametrize("last", [False, True])
def test_the_layers_of_a_network_read_as_many_places_as_there_are_tokens(last: bool) -> None:
    inputs = [torch.arange(96.0).view(2, 3, 8, 2), torch.arange(8).unsqueeze(0)]
    how = (None, {1: tiny.length(2, 8)})
    program = program_of(lambda cache, places: cache_read(cache, places, last), *inputs, dynamic=how)
    made, _ = interpreted(program, inputs, [False, True], least=2)
    for count in (2, 3, 8):
        (out,) = network_in_torch.run(made.ctx.net, [inputs[0], inputs[1][:, :count]])
        assert out.equal(inputs[0][:, :, -count:] if last else inputs[0][:, :, :count])


def test_a_chunk_in_torchs_own_words_computes_the_same() -> None:
    """What ``export.format=[pt2]`` writes, of a layer that sees every token and of one with a ring."""
    cache, rewritten, _ = made("gemma3_text", 100)
    chunk = rewritten["engine"]
    plain = in_aten(copy.deepcopy(chunk.program))
    draw = torch.Generator().manual_seed(0)
    held = [torch.randn(each.shape, generator=draw) for each in cache.tensors(CPU)]
    for number, real in ((0, CHUNK), (3, 50)):
        places = torch.arange((number + 1) * CHUNK).unsqueeze(0)
        given = {
            "input_ids": tokens(1, CHUNK), "last": torch.tensor([real - 1]), "places": places,
            "keys": held[:2], "values": held[2:], "real": torch.tensor([real]), "near": places[:, -256:],
        }  # fmt: skip
        with torch.no_grad():
            for found, wanted in zip(plain.module()(**given), chunk.program.module()(**given), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_window_as_long_as_the_cache_is_read_where_it_lies() -> None:
    cache, rewritten, _ = made("mistral", 800)
    assert cache.rings == (None,) and cache.near is None
    assert {spec.name for spec in rewritten["engine"].inputs} == {"input_ids", "last", "places", "keys_0", "values_0"}


def test_a_chunk_as_long_as_the_cache_has_rings_too() -> None:
    cache, _, generator = made("mistral", 100, chunk=768)
    assert (cache.capacity, cache.rings, cache.near) == (768, (128,), 768)
    for length in (90, 700):
        ids = tokens(1, length, seed=length)
        found = generator.forced_logits(ids, None, 9)
        torch.testing.assert_close(found, expected("mistral", 100, ids[0], 9), rtol=1e-4, atol=1e-5)


RUNS = {
    "a hybrid": ("gemma3_text", ["shape.batch=1"]),
    "rows of different lengths": ("mistral", ["shape.batch=3", "benchmark.generate.batch=3"]),
}


@pytest.mark.parametrize("name", ["a hybrid", pytest.param("rows of different lengths", marks=pytest.mark.slow)])
def test_a_run_is_built_and_verified_and_the_next_finds_its_engine_without_a_trace(
    name: str, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, overrides = RUNS[name]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(architecture(family, 100)))
    settings = [
        "model.weights=random", "shape.max=400", "cache=in_engine", f"cache.chunk={CHUNK}", "benchmark=generate",
        "benchmark.generate.input_length=390", "benchmark.generate.output_length=8", "benchmark.min_generations=3",
        "benchmark.min_seconds=0.1", "store.enabled=true", f"store.folder={tmp_path / 'engines'}", *overrides,
    ]  # fmt: skip
    traced = []
    export = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *given, **how: traced.append(given) or export(*given, **how))

    first = do(store, tmp_path / "first", tmp_path / "model", *settings)
    assert (first.report["status"], first.report["failure"]) == (DONE, None)
    assert first.report["engine"]["profiles"] == [[128, 512, 512]]
    assert first.report["verify"]["executed"] == ("engine" if GPU else "graph")
    assert first.report["verify"]["generation"]["passed"]
    held = CacheShape.of(json.loads((first.folder / "engine.json").read_text())["cache"])
    assert held.rings[0] == 128 and held.chunk == CHUNK
    assert len(traced) == 3, "a step over every token, to prove the rings; a chunk; a step"

    again = do(store, tmp_path / "again", tmp_path / "model", *settings)
    assert again.report["store"]["hit"] and again.report["status"] == DONE and len(traced) == 3
    assert "export" not in again.report["stages_s"]
    assert CacheShape.of(json.loads((again.folder / "decode.json").read_text())["cache"]) == held


@pytest.mark.slow  # real weights, 18 layers
def test_real_gemma_in_chunks_over_its_rings_is_gemma() -> None:
    form = model_config("gemma3_270m")
    gemma: Any = load(form, "fp32", CPU, 0, print)
    cache, rewritten, generator = over(
        gemma, form, CacheConfig("in_engine", 1024, 256), 1, StrategyConfig("detect_causal")
    )
    assert cache.rings == (*[512] * 5, None) * 3
    actions = [call.action for call in rewritten["engine"].attention.calls]
    assert actions == [*["native_window"] * 5, "native_causal"] * 3
    for length, decoded in ((700, 20), (1000, 12)):
        ids = token_batch(gemma.tokenizer, gemma.model.config.vocab_size, 1, length, 0)
        with torch.no_grad():
            wanted = gemma.model(input_ids=ids, logits_to_keep=decoded + 1).logits
        torch.testing.assert_close(generator.forced_logits(ids, None, decoded), wanted, rtol=1e-4, atol=1e-3)
