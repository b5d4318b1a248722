"""Generation through a KV cache: the traced programs in PyTorch, against Hugging Face's own ``generate``."""

from __future__ import annotations

import copy
import functools
from contextlib import nullcontext
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from passes.errors import RunError, UserError
from passes.graph import cache_ops
from passes.graph.rewrite import rewrite
from passes.graph.rewritten import Rewritten
from passes.tensorrt import one_row
from passes.tensorrt import rows as row_converters
from passes.tensorrt.versions import load_stack
from pipeline.config.schema import BackendConfig, CacheConfig, ShapeConfig
from pipeline.engine import network as compile
from pipeline.engine.build import build_engine
from pipeline.engine.session import GraphSession
from pipeline.generate.prompts import PromptRunner
from pipeline.generate.rows import aligned
from pipeline.generate.sampling import Sampling
from pipeline.generate.with_cache import CachedGenerator
from pipeline.rivals.generation import EagerGenerator
from pipeline.rivals.kernels import Kernels
from pipeline.trace import cached_forms
from pipeline.trace.cache_shape import CacheShape, cache_shape
from pipeline.trace.call_form import Traced

SLOW = pytest.mark.slow
CPU = torch.device("cpu")
CAPACITY = 128


@functools.cache
def programs(
    name: str, mode: str, batch: int, strategy: str = "detect_causal", **changes: Any
) -> tuple[CacheShape, list[Traced], list[Rewritten]]:
    model = tiny.model(name, **changes)
    shape = ShapeConfig("dynamic", batch, 2, 32, 48)
    cache = cache_shape(model, CacheConfig(mode), shape, 60)
    traced = [
        cached_forms.trace_prefill(cached_forms.PrefillForm(model, cache), cache, shape, CPU),
        cached_forms.trace_decode(cached_forms.DecodeForm(model, cache), cache, CPU),
    ]
    return cache, traced, [rewrite(each.program, strategy, "mask") for each in traced]


def lowered_step(name: str, **changes: Any) -> tuple[GraphModule, dict[str, Any]]:
    """The caller's own copy of the lowered decode graph, and inputs for it: token 7 at place 3 of random caches."""
    cache, traced, rewritten = programs(name, "in_engine", 1, **changes)
    lowered = compile.lower(load_stack(), rewritten[1].program, traced[1].inputs, BackendConfig("tensorrt"), "fp32")
    caches, count = [torch.randn(x.shape) for x in cache.tensors(CPU)], len(cache.layers)
    inputs = {"input_ids": torch.tensor([[7]]), "position": torch.tensor([3])}
    return copy.deepcopy(lowered.graph), inputs | {"keys": caches[:count], "values": caches[count:]}


def generator(name: str, mode: str, batch: int = 1, strategy: str = "detect_causal", **changes: Any) -> CachedGenerator:
    cache, traced, rewritten = programs(name, mode, batch, strategy, **changes)
    prefill, decode = (
        GraphSession(program.program.module(), tuple(spec.name for spec in each.inputs))
        for each, program in zip(traced, rewritten, strict=True)
    )
    vocabulary = tiny.model(name, **changes).config.vocab_size
    turns = [decode] if mode == "in_engine" else [decode, GraphSession(decode._graph, decode._inputs)]
    return CachedGenerator(prefill, turns, cache, vocabulary, CPU)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_is_handed_over_without_a_word_of_deprecation(name: str, recwarn: pytest.WarningsRecorder) -> None:
    """By every way in which a run does: to look at it, to trace the two forms, and as PyTorch's own generations do."""
    model, shape, tokens = tiny.model(name), ShapeConfig("dynamic", 1, 2, 32, 48), torch.zeros(1, 3, dtype=torch.int64)
    cache = cache_shape(model, CacheConfig("static"), shape, 60)
    layers = cache.tensors(CPU)
    caches = layers[: len(cache.layers)], layers[len(cache.layers) :]
    with torch.no_grad():
        cached_forms.PrefillForm(model, cache)(tokens)
        cached_forms.DecodeForm(model, cache)(tokens[:, :1], torch.tensor([3]), *caches)
        for kind in ("none", "static", "dynamic"):
            rival = EagerGenerator(model, kind, None, Kernels(model))
            rival.prepare(tokens, 2)
            rival.prefill()
            rival.decode()
    said = [str(each.message) for each in recwarn if "deprecated" in str(each.message)]
    assert said == []


def hugging_face(name: str, tokens: Tensor, new_tokens: int, padding: Tensor | None = None) -> list[list[int]]:
    mask = torch.ones_like(tokens) if padding is None else (~padding).long()
    made = tiny.model(name).generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return made[:, tokens.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        pytest.param(name, mode, marks=() if (name, mode) in {("llama", "static"), ("qwen3", "in_engine")} else SLOW)
        for name in ("llama", "qwen2", "qwen3")
        for mode in ("in_engine", "static")
    ],
)
def test_it_generates_what_hugging_face_generates(name: str, mode: str) -> None:
    tokens = tiny.tokens(1, 11)
    engine = generator(name, mode)
    expected = hugging_face(name, tokens, 12)

    assert engine.generate(tokens, 12) == expected
    assert engine.tokens().tolist() == expected
    assert engine.generate(tokens, 12) == expected  # what the first left in the cache is not seen
    assert engine.generate(tokens[:, :5], 3) == hugging_face(name, tokens[:, :5], 3)


@pytest.mark.parametrize("mode", ["in_engine", "static"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_lengths_generate_what_each_would_alone(mode: str, side: str) -> None:
    rows = [tiny.tokens(1, length, seed=length) for length in (13, 4, 9)]
    longest = 13
    tokens, padding = torch.zeros(3, longest, dtype=torch.int64), torch.ones(3, longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(longest - row.shape[1], None) if side == "left" else slice(0, row.shape[1])
        tokens[i, place], padding[i, place] = row[0], False

    made = generator("llama", mode, batch=3).generate(tokens, 8, padding)

    assert made == [hugging_face("llama", row, 8)[0] for row in rows]


WINDOWED = {"sliding_window": 6}


WRITTEN_OUT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "decomposed": ("llama", "decompose", {}),
    "window": ("mistral", "detect_causal", WINDOWED),
    "window decomposed": ("mistral", "decompose", WINDOWED),
}


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        pytest.param(how, mode, marks=pytest.mark.slow if (how, mode) not in quick else ())
        for quick in ([("decomposed", "static"), ("window", "in_engine"), ("window decomposed", "in_engine")],)
        for how in WRITTEN_OUT
        for mode in ("in_engine", "static")
    ],
)
def test_rows_of_different_lengths_are_right_by_their_places_and_by_a_mask_that_is_written_out(
    how: str, mode: str
) -> None:
    """A mask that was made for the first row's place stood for all of them."""
    name, strategy, changes = WRITTEN_OUT[how]
    lengths, decoded = (4, 13, 9), 8
    tokens, padding = tiny.tokens(3, 13), torch.arange(13) < 13 - torch.tensor(lengths).unsqueeze(1)
    engine = generator(name, mode, batch=3, strategy=strategy, **changes)
    (decode,) = {call.action for call in programs(name, mode, 3, strategy, **changes)[2][1].calls}
    assert decode == ("decomposed" if strategy == "decompose" else "cached")

    logits = engine.forced_logits(tokens, padding, decoded)

    model = tiny.model(name, **changes)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            alone = model(input_ids=tokens[row : row + 1, 13 - length :]).logits[:, -min(length, decoded + 1) :]
        torch.testing.assert_close(logits[row : row + 1, -alone.shape[1] :], alone, atol=1e-5, rtol=1e-5)


def test_a_batch_of_a_model_that_computes_with_one_length_for_all_rows_is_refused_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model("llama")
    shape = ShapeConfig("dynamic", 3, 2, 32, 48)
    cache = cache_shape(model, CacheConfig("in_engine"), shape, 60)
    monkeypatch.setattr(
        cached_forms, "masks_of_rows", lambda position, rings: nullcontext()
    )  # as a mask of the model's own making

    with pytest.raises(RunError, match=r"shape.batch=3: LlamaForCausalLM computes with one length") as caught:
        cached_forms.trace_decode(cached_forms.DecodeForm(model, cache), cache, CPU)

    assert caught.value.kind == "ragged_batch"


def test_a_prompt_is_timed_on_the_tokens_that_were_handed_over() -> None:
    engine, tokens = generator("llama", "in_engine"), tiny.tokens(1, 20)
    PromptRunner(engine, alone=False).prepare(tokens)
    with torch.no_grad():
        expected = tiny.model("llama")(input_ids=tokens).logits[:, -1:]
    torch.testing.assert_close(engine._logits, expected, atol=1e-5, rtol=1e-5)


def test_padding_moves_to_the_right() -> None:
    tokens = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 1], [3, 0, 0, 0]])
    padding = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()

    rows, lengths = aligned(tokens, padding)

    assert lengths.tolist() == [2, 4, 1]
    assert rows.tolist() == [[5, 6, 0, 0], [7, 8, 9, 1], [3, 0, 0, 0]]


@pytest.mark.parametrize("mode", ["in_engine", "static"])
@pytest.mark.parametrize("decoded", [0, 1, 7])
def test_logits_through_the_cache_are_those_of_the_whole_sequence(mode: str, decoded: int) -> None:
    tokens = tiny.tokens(1, 20)
    with torch.no_grad():
        expected = tiny.model("llama")(input_ids=tokens).logits[:, 19 - decoded :]

    logits = generator("llama", mode).forced_logits(tokens, None, decoded)

    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_the_cache_can_be_filled_to_its_last_place_and_no_further() -> None:
    tokens = tiny.tokens(1, 48)
    engine = generator("llama", "in_engine")

    assert len(engine.generate(tokens, CAPACITY - 48)[0]) == CAPACITY - 48
    with pytest.raises(UserError, match=r"48 tokens and 81 more: above cache.capacity=128"):
        engine.generate(tokens, CAPACITY - 47)


def test_no_sequence_is_longer_than_the_model_has_positions_for() -> None:
    model, shape = tiny.model("llama", max_position_embeddings=100), ShapeConfig("dynamic", 1, 2, 32, 48)

    cache = cache_shape(model, CacheConfig("in_engine"), shape, 90)

    assert (cache.capacity, cache.longest) == (128, 100)
    with pytest.raises(UserError, match="48 tokens and 53 more: above max_position_embeddings=100 of the model"):
        session = GraphSession(GraphModule({}, Graph()), ())
        CachedGenerator(session, [session], cache, 8, CPU).prepare(tiny.tokens(1, 48), 53)


def test_generation_ends_at_a_stop_token_and_every_token_is_handed_out() -> None:
    tokens = tiny.tokens(1, 11)
    expected = hugging_face("llama", tokens, 12)[0]
    seen: list[int] = []

    made = generator("llama", "in_engine").generate(
        tokens, 12, stop=frozenset([expected[4]]), on_tokens=lambda step: seen.extend(step)
    )

    end = expected.index(expected[4])
    assert made == [expected[:end]]
    assert seen == expected[: end + 1]


def test_sampling_is_seeded_and_narrow_sampling_is_greedy() -> None:
    tokens, engine = tiny.tokens(1, 11), generator("llama", "in_engine")
    hot = [engine.generate(tokens, 12, sampling=Sampling(1.5, 0.9, seed)) for seed in (1, 2, 1)]

    assert hot[0] == hot[2] != hot[1]
    assert engine.generate(tokens, 12, sampling=Sampling(1.0, 1e-6, 3)) == engine.generate(tokens, 12)


def test_sampling_draws_from_the_nucleus_by_its_probabilities() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    draws = torch.linspace(0, 1 - 1e-6, 10_000)
    chosen = Sampling(1.0, 0.79).choose(logits.expand(10_000, 4), draws)[:, 0].bincount(minlength=4) / 10_000

    assert chosen.tolist() == pytest.approx([0.625, 0.375, 0, 0], abs=1e-3)


def test_a_draw_is_below_one_and_never_takes_what_lies_outside_of_the_nucleus() -> None:
    seed, step = 87, 634_329  # of this seed this number, rounded to float32, is 1
    draws = Sampling(1.0, 1.0, seed).draws(step + 1, 1, CPU)
    assert float(draws.max()) == float(draws[step]) == 1 - 2**-24

    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)) * 3
    for top_p in (0.5, 0.9, 1.0):
        chosen = Sampling(1.0, top_p).choose(logits, draws[step].expand(64))
        probabilities = logits.double().softmax(-1)
        above = (probabilities * (probabilities > probabilities.gather(1, chosen))).sum(-1)
        assert bool((above < top_p + 1e-6).all()), "the token is one of the fewest that reach top_p"
    certain = torch.tensor([[50.0, -120.0, -120.0]])  # to float32 nothing is left for the others
    assert Sampling(1.0).choose(certain, torch.ones(1)).tolist() == [[0]]


def test_the_decode_mask_is_proved_and_dropped_with_the_position_that_writes_the_cache() -> None:
    _, _, (_, decode) = programs("llama", "in_engine", 3)

    assert {call.action for call in decode.calls} == {"cached"}
    assert {(call.mask, call.proof, *call.depends_on) for call in decode.calls} == {
        ("causal_offset", "proved", "position")
    }
    assert not any("le.Tensor" in str(node.target) for node in decode.program.graph.nodes)  # the mask's graph is gone


def test_a_window_of_the_decode_mask_is_proved_and_dropped_too() -> None:
    _, _, (_, decode) = programs("mistral", "in_engine", 1, **WINDOWED)
    assert {(call.action, call.mask, *call.depends_on) for call in decode.calls} == {
        ("cached", "sliding_window_offset", "position")
    }
    assert not any("le.Tensor" in str(node.target) for node in decode.program.graph.nodes)  # the mask's graph is gone

    tokens, model = tiny.tokens(1, 20), tiny.model("mistral", **WINDOWED)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits[:, 12:]
    logits = generator("mistral", "in_engine", **WINDOWED).forced_logits(tokens, None, 7)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def step_over_cache(query: Tensor, cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    """A decode step whose mask is no offset and no window: every third key is blocked."""
    keys, places = cache_ops.cache_update(cache, new, position), torch.arange(cache.shape[2])
    mask = (places <= position[:, None, None, None]) & (places % 3 != 1)
    return torch.nn.functional.scaled_dot_product_attention(query, keys, keys, mask) * 1.0


def test_a_mask_that_is_not_proved_a_place_is_applied_and_an_error_where_that_was_asked_for() -> None:
    one, cache = torch.randn(2, 4, 1, 16), torch.randn(2, 4, 12, 16)
    inputs = one, cache, one.flip(0), torch.tensor([3, 7])
    program = tiny.program_of(step_over_cache, *inputs)
    rewritten = rewrite(copy.deepcopy(program), "detect_causal", "mask")
    assert [call.action for call in rewritten.calls] == ["decomposed"]
    torch.testing.assert_close(rewritten.program.module()(*inputs), step_over_cache(*inputs), rtol=1e-5, atol=1e-6)

    with pytest.raises(RunError, match="not proved causal"):
        rewrite(program, "detect_causal", "error")


@pytest.mark.parametrize(("name", "biases"), [pytest.param("llama", 0, marks=pytest.mark.slow), ("qwen2", 1)])
def test_products_that_share_a_row_become_one(name: str, biases: int) -> None:
    graph, inputs = lowered_step(name)
    count = len(inputs["keys"])
    before = graph(**inputs)

    tiny.with_fused_rows(graph)

    lone = [node for node in graph.graph.nodes if row_converters.applies(node)]
    shapes = [tuple(node.args[1].meta["val"].shape) for node in lone]
    layer = [(128, 64), (64, 64), (192, 64), (64, 96)]  # query, key and value; output; gate and up; down
    assert shapes == [*(layer * count), (128, 64)]  # and the head
    assert sum(len(node.args) > 2 and node.args[2] is not None for node in lone) == biases * count
    for one, other in zip(graph(**inputs), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


slow = pytest.mark.slow
PARALLEL = [
    pytest.param("gptj", 3, marks=slow), ("cohere", 4),
    pytest.param("phi", 3, marks=slow), pytest.param("stablelm", 4, marks=slow),
    pytest.param("gpt_neox", 0, marks=slow), pytest.param("falcon", 0, marks=slow),  # one already, and a norm each
]  # fmt: skip
"""Attention and MLP read the same row: the products that are put together stand far apart.  How many there are less."""


@pytest.mark.parametrize(("name", "less"), PARALLEL)
def test_products_of_parallel_blocks_become_one_in_an_order_that_runs(name: str, less: int) -> None:
    graph, inputs = lowered_step(name)
    before = graph(**inputs)
    count = sum(node.target is row_converters.LINEAR for node in graph.graph.nodes)

    tiny.with_fused_rows(graph)

    assert sum(node.target is row_converters.LINEAR for node in graph.graph.nodes) == count - less
    for one, other in zip(graph(**inputs), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_no_product_of_a_row_is_a_matrix_product_that_with_the_vocabulary_neither() -> None:
    _, traced, rewritten = programs("llama", "in_engine", 1, vocab_size=row_converters.VOCABULARY)
    stack = load_stack()
    lowered = compile.lower(stack, rewritten[1].program, traced[1].inputs, BackendConfig("tensorrt"), "fp32")

    network = compile.interpret(stack, lowered, compile.ours(in_place=True))

    net = network.interpreter.ctx.net
    layers = [net.get_layer(i) for i in range(net.num_layers)]
    assert not [layer.name for layer in layers if str(layer.type).endswith("MULTIPLY")]
    assert build_engine(stack, network, lambda *_: True).data is not None


@pytest.mark.parametrize(
    ("out", "inner", "whole", "shape"),
    [
        (2049, 2048, False, (2049, 2, 1024)),
        (48, 32, False, (48, 2, 16)),
        (2048, 2048, False, (2048, 2048)),  # as many outputs as inputs
        (48, 32, True, (48, 32)),
        (48, 24, False, (48, 24)),  # no two pieces of a multiple of eight
    ],
)
def test_the_sum_of_a_row_is_taken_in_two_pieces_where_it_has_more_outputs(
    out: int, inner: int, whole: bool, shape: tuple[int, ...]
) -> None:
    trt = load_stack().trt
    net = trt.Builder(load_stack().torch_tensorrt.logging.TRT_LOGGER).create_network(0)
    weight, row = net.add_input("weight", trt.float16, (out, inner)), net.add_input("row", trt.float16, (1, inner))

    got = one_row.times_row(load_stack(), net, weight, row, whole)

    assert (got.dtype, tuple(got.shape)) == (trt.float16, (out,))
    layers = [net.get_layer(i) for i in range(net.num_layers)]
    [terms] = [layer.get_output(0) for layer in layers if layer.type == trt.LayerType.ELEMENTWISE]
    summed = [layer.get_input(0).dtype for layer in layers if layer.type == trt.LayerType.REDUCE]
    assert tuple(terms.shape) == shape
    assert summed == ([trt.float32] * 2 if len(shape) > 2 else [trt.float16])


def test_a_row_that_something_else_reads_too_keeps_its_products_apart() -> None:
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            row = x * 2
            return torch.cat([self.one(row), self.other(row), row], -1)

    graph = torch.export.export(Both(), (torch.randn(1, 8),)).run_decompositions({}).module()
    targets = [node.target for node in graph.graph.nodes]

    tiny.with_fused_rows(graph)

    assert [node.target for node in graph.graph.nodes] == targets
