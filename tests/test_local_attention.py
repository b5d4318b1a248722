"""Windows and chunks of a prompt in blocks: right at every length, in PyTorch and in the layers of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import network_in_torch
import pytest
import tiny
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import Interpreter
from torch.nn.functional import scaled_dot_product_attention as sdpa

from passes.graph.local_attention import chunked, chunked_in_aten, windowed, windowed_in_aten
from passes.graph.rewrite import rewrite
from passes.tensorrt.registry import registered
from passes.tensorrt.versions import load_stack, quiet
from pipeline.config.schema import BackendConfig
from pipeline.engine import network as compile

SCALE = 0.3


def tensors(length: int, batch: int = 1, size: int = 16, values: int = 16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, 4, length, size), (batch, 2, length, size), (batch, 2, length, values)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def seen(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, chunk: int | None = None) -> Tensor:
    """PyTorch's own attention with the whole mask."""
    rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    near = rows - keys < window if window else keys // chunk == rows // chunk
    return sdpa(q, k, v, (keys <= rows) & near, scale=SCALE, enable_gqa=True)


LENGTHS = (1, 2, 4, 5, 6, 7, 8, 11, 12, 13, 24, 25, 61)


@pytest.mark.parametrize("width", [1, 5, 6, 12])
@pytest.mark.parametrize("block", [1, 4, 6, 9, 64])
def test_a_window_in_blocks_is_the_window_at_every_length(width: int, block: int) -> None:
    for length in LENGTHS:
        inputs = tensors(length, batch=2, values=8, seed=length)
        wanted = seen(*inputs, window=width)
        for made in (windowed, windowed_in_aten):
            out = made(*inputs, width, block, length % 2 == 0, SCALE)
            torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 6, 12])
def test_chunks_by_themselves_are_chunked_attention_at_every_length(size: int) -> None:
    for length in LENGTHS:
        inputs = tensors(length, batch=2, values=8, seed=length)
        wanted = seen(*inputs, chunk=size)
        torch.testing.assert_close(chunked(*inputs, size, SCALE), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(chunked_in_aten(*inputs, size, SCALE), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 5, 6, 12])
@pytest.mark.parametrize("block", [1, 4, 6, 9, 64])
def test_the_last_queries_of_a_text_see_their_windows_behind_any_past(width: int, block: int) -> None:
    for length, past in ((1, 3), (2, 1), (5, 2), (6, 6), (12, 1), (12, 13), (13, 40)):
        query, key, value = tensors(length + past, batch=2, values=8, seed=length)
        wanted = seen(query, key, value, window=width)[:, :, past:]
        for made in (windowed, windowed_in_aten):
            out = made(query[:, :, past:], key, value, width, block, False, SCALE)
            torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_a_chunk_behind_a_past_is_proved_a_window_and_written_in_blocks() -> None:
    """As a chunk of a prompt over the places of its cache up to itself; one query alone stays as it is."""

    def attention(query: Tensor, key: Tensor) -> Tensor:
        keys = torch.arange(key.shape[2])
        rows = torch.arange(query.shape[2])[:, None] + (key.shape[2] - query.shape[2])
        return sdpa(query, key, key, (keys <= rows) & (keys > rows - 6))

    for queries, action in ((5, "native_window"), (1, "decomposed")):
        query, key = torch.randn(1, 2, queries, 16), torch.randn(1, 2, 17, 16)
        program = tiny.program_of(attention, query, key, dynamic=(None, {2: Dim("keys", min=queries, max=64)}))
        rewritten = rewrite(program, "detect_causal")
        assert [(call.mask, call.action) for call in rewritten.calls] == [("sliding_window", action)]
        for past in (0, 1, 6, 40):
            key = torch.randn(1, 2, queries + past, 16)
            out = rewritten.program.module()(query, key)
            torch.testing.assert_close(out, attention(query, key), rtol=1e-5, atol=1e-5)


# -- the network -------------------------------------------------------------------------------------


def network(
    function: Callable[..., Tensor],
    batch: int,
    longest: int,
    dynamic: bool,
    values: int = 16,
    queries: int | None = None,
) -> Any:
    """The interpreter that made the TensorRT network of ``function`` of query, key and value, for every length up to
    ``longest`` or for that one, and the native layers in it; ``queries``: the last so many alone."""
    inputs = tensors(longest, batch, values=values)
    length = {2: Dim("length", min=queries or 1, max=longest)}
    if queries is not None:
        inputs[0] = inputs[0][:, :, :queries]
    given = (length if queries is None else None, length, length)
    program = tiny.program_of(function, *inputs, dynamic=given if dynamic else None)
    return interpreted(program, inputs, [dynamic and x.shape[2] == longest for x in inputs], queries or 1)


def interpreted(program: ExportedProgram, inputs: list[Tensor], dynamic: list[bool], least: int = 1) -> Any:
    """As :func:`network`, of ``program``; ``dynamic``: whose lengths, from ``least`` up to that of its input."""
    stack, made = load_stack(), []
    lowered = compile.lower(stack, program, (), BackendConfig("tensorrt"), "fp32")
    from torch_tensorrt.dynamo.conversion import TRTInterpreter

    with quiet(), torch.no_grad():
        specs = [
            _spec(stack, node.name, x, free, least)
            for node, x, free in zip(_inputs(lowered.graph), inputs, dynamic, strict=True)
        ]
        with registered(*compile.ours().converters(stack, made)):
            interpreter = TRTInterpreter(lowered.graph, specs, compilation_settings=lowered.settings)
            Interpreter.run(interpreter)
    return interpreter, made  # whose context holds the constants' memory


def _inputs(module: Any) -> list[Any]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _spec(stack: Any, name: str, x: Tensor, dynamic: bool, least: int) -> Any:
    given = stack.torch_tensorrt.Input
    if not dynamic:
        return given(shape=tuple(x.shape), dtype=x.dtype, name=name)
    axis = 2 if x.dim() == 4 else 1  # of [batch, heads, length, size], or of a number for each token
    shortest = (*x.shape[:axis], least, *x.shape[axis + 1 :])
    return given(min_shape=shortest, opt_shape=tuple(x.shape), max_shape=tuple(x.shape), dtype=x.dtype, name=name)


FORMS: dict[str, tuple[Callable[..., Tensor], dict[str, int]]] = {
    "blocks of a window": (lambda q, k, v: windowed(q, k, v, 6, 6, False, SCALE), {"window": 6}),
    "blocks that shrink": (lambda q, k, v: windowed(q, k, v, 7, 3, True, SCALE), {"window": 7}),
    "blocks of more": (lambda q, k, v: windowed(q, k, v, 3, 8, False, SCALE), {"window": 3}),
    "chunks": (lambda q, k, v: chunked(q, k, v, 6, SCALE), {"chunk": 6}),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_layers_of_a_network_compute_it_at_every_length_of_the_profile(name: str) -> None:
    function, kind = FORMS[name]
    made, _ = network(function, batch=2, longest=40, dynamic=True, values=8)
    for length in (1, 2, 3, 5, 6, 7, 8, 9, 12, 13, 14, 18, 19, 39, 40):
        inputs = tensors(length, batch=2, values=8, seed=length)
        (out,) = network_in_torch.run(made.ctx.net, inputs)
        torch.testing.assert_close(out, seen(*inputs, **kind), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [5, 12])
def test_the_layers_of_a_network_compute_a_chunk_over_its_cache_at_every_past(queries: int) -> None:
    """The queries are a chunk of one length, and the keys as many as the text has up to there."""

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return windowed(query, key, value, 6, 4, False, SCALE)

    made, layers = network(function, batch=2, longest=40, dynamic=True, values=8, queries=queries)
    assert len(layers) == 1
    for length in (queries, queries + 1, queries + 5, queries + 6, queries + 9, 40):
        query, key, value = tensors(length, batch=2, values=8, seed=length)
        inputs = [query[:, :, length - queries :], key, value]
        (out,) = network_in_torch.run(made.ctx.net, inputs)
        wanted = seen(query, key, value, window=6)[:, :, length - queries :]
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [8, 40])
@pytest.mark.parametrize("name", FORMS)
def test_the_layers_of_a_network_of_one_length_compute_it(name: str, length: int) -> None:
    function, kind = FORMS[name]
    made, _ = network(function, batch=2, longest=length, dynamic=False)
    net, inputs = made.ctx.net, tensors(length, batch=2)
    (out,) = network_in_torch.run(net, inputs)
    torch.testing.assert_close(out, seen(*inputs, **kind), rtol=1e-5, atol=1e-5)
    kinds = {net.get_layer(i).type.name for i in range(net.num_layers)}
    assert "SHAPE" not in kinds  # nothing is calculated when the engine runs
