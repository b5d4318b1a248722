"""Prompts in chunks over the KV cache: the traced program, what generates with it, and whole runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import save_tiny_llama
from runs import DONE, GPU, do
from torch import Tensor

from passes.errors import RunError, UserError
from passes.graph import ops
from passes.graph.local_attention import WINDOWED
from passes.graph.rewrite import rewrite
from passes.graph.rewritten import Rewritten
from pipeline.__main__ import compose_config
from pipeline.config.lengths import capacity_of, longest_sequence
from pipeline.config.schema import CacheConfig, GenerateShape, ShapeConfig
from pipeline.deploy.writers import CachedWriter
from pipeline.engine import programs
from pipeline.engine.session import GraphSession
from pipeline.generate.prompts import PromptRunner
from pipeline.generate.sampling import Sampling
from pipeline.generate.with_cache import CachedGenerator
from pipeline.record.console import described
from pipeline.sweep.estimate import device_bytes
from pipeline.trace.cache_shape import CacheShape, cache_shape
from pipeline.trace.cache_states import State
from pipeline.trace.call_form import CallForm, InputSpec, trace
from pipeline.trace.largest import MOST, at_most, refuse_larger
from pipeline.verify.cases import DECODED, lengths

CPU = torch.device("cpu")
CHUNK, LONGEST = 128, 500
SHAPE = ShapeConfig("dynamic", 1, 2, 300, 300)
SLOW = pytest.mark.slow


@functools.cache
def made(
    name: str, batch: int, strategy: str = "detect_causal", **changes: Any
) -> tuple[CacheShape, dict[str, tuple[InputSpec, ...]], dict[str, Rewritten]]:
    model = tiny.model(name, **changes)
    shape = replace(SHAPE, batch=batch)
    cache = cache_shape(model, CacheConfig("in_engine", chunk=CHUNK), shape, LONGEST)
    traced = {part: form() for part, form in programs.parts(model, tiny.config(name), shape, cache).items()}
    inputs = {part: each.inputs for part, each in traced.items()}
    return cache, inputs, {part: rewrite(each.program, strategy, "mask") for part, each in traced.items()}


def generator(name: str, batch: int, strategy: str = "detect_causal", **changes: Any) -> CachedGenerator:
    cache, inputs, rewritten = made(name, batch, strategy, **changes)
    prompts, decode = (
        GraphSession(rewritten[part].program.module(), tuple(spec.name for spec in inputs[part]))
        for part in ("engine", "decode")
    )
    return CachedGenerator(prompts, [decode], cache, tiny.model(name, **changes).config.vocab_size, CPU)


def alone(name: str, row: Tensor, new_tokens: int, **changes: Any) -> list[int]:
    """What Hugging Face generates after ``row`` [length]."""
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    found = tiny.model(name, **changes).generate(row.unsqueeze(0), attention_mask=torch.ones(1, len(row)), **settings)
    return found[0, len(row) :].tolist()


def ragged(real: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of ``real`` tokens, and their padding, on the left."""
    longest = max(real)
    return tiny.tokens(len(real), longest), torch.arange(longest) < longest - torch.tensor(real).unsqueeze(1)


# What is generated


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3", marks=SLOW), pytest.param("gpt2", marks=SLOW)])
def test_behind_a_prompt_in_chunks_comes_what_hugging_face_generates(name: str) -> None:
    engine = generator(name, 1)
    for length in (300, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 5, 1):
        tokens = tiny.tokens(1, length, seed=length)

        assert engine.generate(tokens, 6) == [alone(name, tokens[0], 6)], length


@pytest.mark.parametrize(
    ("name", "changes"),
    [("llama", {}), pytest.param("mistral", {"sliding_window": 40}, marks=SLOW), pytest.param("qwen2", {}, marks=SLOW)],
)
def test_rows_that_end_in_different_chunks_generate_what_each_would_alone(name: str, changes: dict[str, Any]) -> None:
    real = [300, 1, 128, 129, 127, 256, 257, 64, 290, 30, 200, 2, 140, 255, 299, 77]
    tokens, padding = ragged(real)

    rows = generator(name, len(real), **changes).generate(tokens, 5, padding)

    assert rows == [alone(name, tokens[i, -length:], 5, **changes) for i, length in enumerate(real)]


def test_a_row_that_has_ended_costs_its_place_and_changes_no_other() -> None:
    real = [300, 1, 128, 129, 127, 256, 257, 64, 290, 30, 200, 2, 140, 255, 299, 77]
    tokens, padding = ragged(real)
    engine, steps = generator("llama", len(real)), 0
    whole = engine.generate(tokens, 5, padding)
    stop = frozenset(row[2] for row in whole)

    def count(latest: list[int]) -> None:
        nonlocal steps
        steps += 1

    cut = engine.generate(tokens, 5, padding, stop=stop, on_tokens=count)

    ends = [next(i for i, token in enumerate(row) if token in stop) for row in whole]
    assert cut == [row[:end] for row, end in zip(whole, ends, strict=True)]
    assert steps == max(ends) + 1 <= 3, "nothing runs for rows that have all ended"


@pytest.mark.parametrize(
    ("name", "changes", "how"),
    [
        pytest.param(name, changes, how, marks=() if (name, how) == ("mistral", "detect_causal") else SLOW)
        for name, changes in (("mistral", {"sliding_window": 40}), ("llama", {}))
        for how in ("detect_causal", "lowering", "decompose")
    ],
)
def test_logits_behind_chunks_are_those_of_the_whole_sequence_whatever_the_mask(
    name: str, changes: dict[str, Any], how: str
) -> None:
    """A window's mask is applied, to the chunk and to the step: rows at places of their own see what they should."""
    real = [300, 128, 7]
    tokens, padding = ragged(real)

    logits = generator(name, 3, how, **changes).forced_logits(tokens, padding, DECODED)

    for row, length in enumerate(real):
        with torch.no_grad():
            expected = tiny.model(name, **changes)(input_ids=tokens[row : row + 1, -length:]).logits[:, -DECODED - 1 :]
        torch.testing.assert_close(logits[row : row + 1], expected, atol=1e-5, rtol=1e-5)


def test_what_fills_the_last_chunk_up_has_a_position_that_the_model_knows() -> None:
    """Of 300 learned positions the third chunk of a prompt of 290 tokens would ask for 384."""
    tokens, positions = tiny.tokens(1, 290), {"n_positions": 300}

    assert generator("gpt2", 1, **positions).generate(tokens, 10) == [alone("gpt2", tokens[0], 10, **positions)]


def test_a_prompt_of_any_length_up_to_the_capacity_runs_and_none_beyond() -> None:
    engine = generator("llama", 1)
    tokens = tiny.tokens(1, engine.cache.capacity - 1)
    assert engine.cache.capacity == 4 * CHUNK
    assert engine.generate(tokens, 1) == [alone("llama", tokens[0], 1)]
    with pytest.raises(UserError, match=r"511 tokens and 2 more: above cache.capacity=512"):
        engine.generate(tokens, 2)


def test_a_model_that_is_deployed_takes_prompts_of_any_length_that_leaves_room_for_an_answer() -> None:
    writer = CachedWriter(generator("llama", 1), SHAPE)
    assert (writer.shortest, writer.longest_prompt, writer.longest) == (1, 511, 512)
    prompt = tiny.tokens(1, 400)[0]
    assert list(writer.steps(prompt.tolist(), 3, Sampling())) == alone("llama", prompt, 3)


@pytest.mark.parametrize("alone", [False, True])
def test_prompts_are_timed_on_all_of_their_chunks(alone: bool) -> None:
    engine, tokens = generator("llama", 1), tiny.tokens(1, 200)
    launched = 0
    run = engine._prefill.run

    def counted(stream: Any) -> None:
        nonlocal launched
        launched += 1
        run(stream)

    engine._prefill.run = counted  # type: ignore[method-assign]
    runner = PromptRunner(engine, alone)
    runner.prepare(tokens)
    launched = 0
    runner.enqueue()
    with torch.no_grad():
        expected = tiny.model("llama")(input_ids=tokens).logits[:, -1:]

    assert launched == 2
    torch.testing.assert_close(engine._logits, expected, atol=1e-5, rtol=1e-5)
    assert len(engine._decode) == (0 if alone else 1)  # with their weights
    engine.keep_kernels()


def test_steps_that_prompts_leave_tokens_to_are_kept() -> None:
    engine = generator("llama", 1)
    engine.cache = replace(engine.cache, states=(State(0, "conv", 0, (1, 4), "float32"),))
    engine.prompts_only()
    assert engine._decode


# What is proved and built


def test_a_chunks_mask_is_proved_lower_right_at_every_size_of_what_it_sees() -> None:
    _, inputs, rewritten = made("llama", 1)
    chunk = rewritten["engine"]

    assert {(call.mask, call.proof, call.action) for call in chunk.calls} == {
        ("causal_lower_right", "proved", "native_causal")
    }
    layers = chunk.program.graph.find_nodes(op="call_function", target=ops.NATIVE)
    assert [node.args[4] for node in layers] == ["lower_right"] * 2
    (places,) = (spec for spec in inputs["engine"] if spec.name == "places")
    assert (places.min, places.max) == (CHUNK, 4 * CHUNK)


def test_a_chunk_as_long_as_the_cache_is_one_of_a_known_size() -> None:
    model = tiny.model("llama")
    cache = cache_shape(model, CacheConfig("in_engine", chunk=CHUNK), SHAPE, 100)
    traced = programs.parts(model, tiny.config("llama"), SHAPE, cache)["engine"]()

    assert {(call.mask, call.action) for call in rewrite(traced.program, "detect_causal", "mask").calls} == {
        ("causal", "native_causal")
    }


@pytest.mark.parametrize(
    ("batch", "chunk", "longest"),
    [
        (1, CHUNK, 300),
        pytest.param(3, CHUNK, 300, marks=SLOW),
        pytest.param(2, 1024, 4000, marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no NVIDIA GPU")]),
    ],
)
def test_a_run_in_chunks_is_built_verified_at_their_ends_and_reported(
    batch: int, chunk: int, longest: int, store: str, tmp_path: Path
) -> None:
    model = save_tiny_llama(tmp_path / "model", num_hidden_layers=1, max_position_embeddings=8192)
    outcome = do(
        store, tmp_path / "out", model, "benchmark=generate", "cache=in_engine", f"cache.chunk={chunk}",
        f"shape.max={longest}", f"shape.batch={batch}", f"benchmark.generate.batch={batch}",
        f"benchmark.generate.input_length={longest - 40}",
        "benchmark.generate.output_length=8", "benchmark.min_generations=3", "benchmark.min_seconds=0.1",
    )  # fmt: skip
    report = outcome.report

    assert (report["status"], report["failure"]) == (DONE, None)
    assert report["config"]["cache"]["chunk"] == chunk and report["config"]["cache"]["capacity"] is None
    assert report["attention"]["summary"]["by_mask"] == {"causal_lower_right": 1}
    engine = report["engine"]
    assert (engine["iattention_causal"], engine["iattention_fused"], engine["iattention_masked"]) == (1, 1, 0)
    capacity = -(-(longest + 1) // chunk) * chunk
    assert engine["profiles"] == [[chunk, capacity, capacity]]
    prompts = {case["length"] - DECODED for case in report["verify"]["cases"]}
    assert {chunk - 1, chunk, chunk + 1, 2 * chunk, 2 * chunk + 1} <= prompts
    assert report["verify"]["generation"]["passed"]
    assert f"in chunks of {chunk} tokens, over the cache" in described(report)


@pytest.mark.parametrize("end", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1])
def test_prompts_on_both_sides_of_a_chunks_end_are_verified_where_they_fit(end: int) -> None:
    tried = lengths(SHAPE, 384, (), False, CHUNK)

    assert end + DECODED in tried
    assert end + DECODED not in lengths(SHAPE, 384, (), False) and max(tried) <= 384


# What is refused


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["cache.chunk=512"], "cache.chunk=512: backend=tensorrt cache=none runs no prompt in chunks"),
        (["cache=static", "cache.chunk=512"], "cache=static runs no prompt in chunks"),
        (["backend=eager", "cache=dynamic", "cache.chunk=512"], "backend=eager cache=dynamic runs no prompt in chunks"),
        (["backend=plugin", "cache=in_engine", "cache.chunk=512"], "backend=plugin cache=in_engine runs no prompt"),
        (["cache=in_engine", "cache.chunk=-1"], "cache.chunk=-1: must be a multiple of 128 tokens, and at least 128"),
        (["cache=in_engine", "cache.chunk=0"], "cache.chunk=0: must be a multiple of 128 tokens"),
        (["cache=in_engine", "cache.chunk=500"], "cache.chunk=500: must be a multiple of 128 tokens"),
        (["cache=in_engine", "cache.chunk=4096"], "cache.chunk=4096: above shape.max=2048, the longest prompt"),
        (["cache=in_engine", "cache.chunk=4096", "cache.capacity=3000"], "cache.chunk=4096: above cache.capacity=3000"),
        (["cache=in_engine", "shape=static", "cache.chunk=512"], "cache.chunk=512: prompts of any length run in"),
        (["cache=in_engine", "cache.chunk=many"], "cache.chunk=many: must be a whole number or null"),
    ],
)
def test_a_chunk_that_cannot_be_is_refused_in_one_line(settings: list[str], named: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_config(settings)

    assert named in str(caught.value) and "\n" not in str(caught.value)


# Sizes, by arithmetic


def test_the_capacity_is_a_whole_number_of_chunks() -> None:
    shape = ShapeConfig("dynamic", 1, 2, 32768, 32768)

    assert capacity_of(CacheConfig("in_engine", chunk=2048), longest_sequence(shape, None)) == 34816
    assert capacity_of(CacheConfig("in_engine", 30000, 2048), 1) == 30720
    assert capacity_of(CacheConfig("in_engine"), longest_sequence(shape, GenerateShape(1, 32000, 1000))) == 33024


def test_a_cache_of_more_numbers_than_an_index_reaches_is_refused() -> None:
    model = tiny.model("llama", head_dim=128)  # two key heads
    most = ShapeConfig("dynamic", 64, 2, 131072, 131072 - 1024)
    cache = CacheConfig("in_engine", 131072, 2048)

    named = r"shape.batch=64 cache.capacity=131072: 2147483648 numbers in the keys of a layer"
    with pytest.raises(UserError, match=named):
        cache_shape(model, cache, most, 131072)
    fits = cache_shape(model, cache, ShapeConfig("dynamic", 63, 2, 131072, 131072 - 1024), 131072)
    assert fits.capacity == 131072


def test_a_mask_may_have_more_elements_than_32_bits_count_and_in_chunks_has_fewer() -> None:
    """By arithmetic on the sizes: nothing of the kind is allocated."""
    model, longest = tiny.model("mistral", sliding_window=40), 65536
    shape = ShapeConfig("dynamic", 1, 2, longest, longest)
    cache = cache_shape(model, CacheConfig("in_engine", chunk=CHUNK), shape, longest + 128)
    masks = []
    for held in (None, cache):
        form = programs.parts(model, tiny.config("mistral"), shape, held)["engine"]
        program = rewrite(form().program, "mask_input").program
        refuse_larger(program)
        (layer,) = program.graph.find_nodes(op="call_function", target=ops.NATIVE)
        masks.append(at_most(layer.args[3]))

    assert masks == [longest**2, CHUNK * cache.capacity] and masks[0] > MOST > masks[1]


def test_the_keys_of_a_windows_blocks_are_counted_too() -> None:
    """Every key is in 1 + 4096 / 256 blocks."""
    window, longest = {"sliding_window": 4096, "max_position_embeddings": 2**23}, 2**22
    form = CallForm(tiny.model("mistral", **window), "last")
    traced = trace(form, tiny.config("mistral"), ShapeConfig("dynamic", 2, 2, longest, longest), CPU)
    program = rewrite(traced.program, "detect_causal").program
    (layer,) = program.graph.find_nodes(op="call_function", target=WINDOWED)
    assert at_most(layer) == 17 * 2 * 2 * longest * 16
    with pytest.raises(RunError, match=rf"{layer.name} has 32768 x 2 x 4352 x 16 elements"):
        refuse_larger(program)


def test_logits_of_more_elements_than_32_bits_count_are_refused() -> None:
    shape = ShapeConfig("dynamic", 2, 2, 2**23, 2**23)
    program = trace(CallForm(tiny.model("qwen3"), "all"), tiny.config("qwen3"), shape, CPU).program
    program = rewrite(program, "detect_causal").program
    assert max(map(at_most, program.graph.nodes)) == 2**47, "the evidence of its proof, which is no part of it"

    with pytest.raises(
        RunError, match=r"has 2 x 8388608 x 128 elements, above the 2147483647 .* smaller shape.max"
    ) as caught:
        refuse_larger(program)
    assert caught.value.kind == "too_large"


def test_device_memory_counts_the_cache() -> None:
    base = ["model=llama3_1b", "model.weights=random", "shape.max=32768"]
    token = 16 * 2 * 8 * 64 * 2  # layers, keys and values, heads, channels, bytes
    without = device_bytes(compose_config(base), {})
    assert without is not None

    found = device_bytes(compose_config([*base, "cache=in_engine", "cache.chunk=2048"]), {})
    assert found == without + 34816 * token
    assert device_bytes(compose_config([*base, "cache=static", "cache.capacity=32768"]), {}) == without + 65536 * token
    rows = ["shape.batch=4", "cache=in_engine", "cache.capacity=32768", "benchmark=none"]
    assert device_bytes(compose_config([*base, *rows]), {}) == without + 8 * 3 * 128_256 + 4 * 32768 * token
