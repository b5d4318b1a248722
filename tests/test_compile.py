"""Real engines of tiny models, built ahead of time where there is no GPU, and what their networks hold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention

from passes.errors import RunError
from passes.graph import ops
from passes.graph.prepare import prepare
from passes.graph.rewrite import rewrite
from passes.tensorrt import attention
from passes.tensorrt.versions import load_stack, quiet
from pipeline.config.schema import BackendConfig
from pipeline.engine import network as compile
from pipeline.engine.build import Built, build_engine
from pipeline.engine.network import Network
from pipeline.trace.call_form import InputSpec, Traced

BACKEND = BackendConfig("tensorrt")


def on(phase: str, step: int, steps: int) -> bool:
    return True


def network(traced: Traced, strategy: str, unproven: str | None = None, precision: str = "fp16", **how: Any) -> Network:
    stack = how.pop("stack", None) or load_stack()
    program = rewrite(traced.program, strategy, unproven).program
    conversion = compile.UPSTREAM if strategy == "upstream" else compile.ours()
    return compile.interpret(stack, compile.lower(stack, program, traced.inputs, BACKEND, precision), conversion)


def layers(made: Network, kind: str) -> list[Any]:
    net = made.interpreter.ctx.net
    found = [net.get_layer(i) for i in range(net.num_layers)]
    return [layer for layer in found if layer.type == getattr(load_stack().trt.LayerType, kind)]


# strategy, unproven, what the network must hold: native layers, causal, masked, fused, softmax
HOLDS = [
    ("detect_causal", "mask", 2, 2, 0, 2, 0),
    pytest.param("mask_input", None, 2, 0, 2, 2, 0, marks=pytest.mark.slow),  # test_run has whole runs of these two
    pytest.param("lowering", "keep", 2, 2, 0, 2, 0, marks=pytest.mark.slow),
    ("decompose", None, 0, 0, 0, None, 2),
    ("upstream", None, 2, 0, 2, None, 0),
]


@pytest.mark.parametrize(("strategy", "unproven", "native", "causal", "masked", "fused", "softmax"), HOLDS)
def test_an_engine_holds_the_attention_that_the_strategy_promises(
    strategy: str, unproven: str | None, native: int, causal: int, masked: int, fused: int | None, softmax: int
) -> None:
    made = network(tiny.traced("llama", "fp16"), strategy, unproven)
    steps: list[tuple[str, int, int]] = []
    built = build_engine(load_stack(), made, lambda *step: steps.append(step) or True)
    section = built.engine
    keys = ("iattention", "iattention_causal", "iattention_masked", "iattention_fused", "softmax")
    assert tuple(getattr(section, key) for key in keys) == (native, causal, masked, fused, softmax)
    assert len(layers(made, "ATTENTION_INPUT")) == native and len(layers(made, "SOFTMAX")) == softmax
    assert section.layers == made.interpreter.ctx.net.num_layers and section.torch_fallback_ops == ()
    assert [layer.form.heads for layer in made.native_layers] == [(4, 2)] * (native if strategy != "upstream" else 0)
    assert_consistent(built)
    assert steps and all(0 < step <= total for _, step, total in steps)


def assert_consistent(built: Built) -> None:
    data = bytes(built.data)
    assert (built.engine.bytes, built.engine.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert built.engine.bytes > 10_000 and built.engine.target


def test_fp32_says_that_there_is_no_fused_kernel() -> None:
    made = network(tiny.traced("llama"), "lowering", "keep", "fp32")
    assert (made.contents.iattention, made.contents.iattention_causal) == (2, 2)
    assert made.contents.iattention_fused == 0
    assert "2 of 2 attention layers have no fused kernel" in made.contents.notes[0]
    assert_consistent(build_engine(load_stack(), made, on))


def test_padding_reaches_the_native_layer_as_a_mask() -> None:
    made = network(
        tiny.traced("llama", inputs=("input_ids", "attention_mask"), batch=2), "detect_causal", "mask", "fp32"
    )
    assert (made.contents.iattention_causal, made.contents.iattention_masked) == (0, 2)
    net = made.interpreter.ctx.net
    assert [net.get_input(i).name for i in range(net.num_inputs)] == ["input_ids", "attention_mask"]


# -- small graphs ------------------------------------------------------------------------------------


class Heads(nn.Module):
    """Token ids [1, length] -> ``function`` of query, key and value, each [1, heads, length, size]."""

    def __init__(
        self, function: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype, size: int, heads: int
    ) -> None:
        super().__init__()
        self.function, self.size, self.heads = function, size, heads
        self.table = nn.Parameter(torch.ones(8, 3 * heads * size, dtype=dtype), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        split = embedding(input_ids, self.table).view(1, -1, 3, self.heads, self.size)
        query, key, value = (part.transpose(1, 2) for part in split.unbind(2))
        return self.function(query, key, value)


def small(
    function: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float16, size: int = 16,
    static: bool = False, heads: int = 2,
) -> Traced:  # fmt: skip
    tokens = torch.zeros(1, 12, dtype=torch.int64)
    dynamic = None if static else {"input_ids": {1: tiny.length(1, 32)}}
    with torch.no_grad(), quiet():
        program = prepare(
            torch.export.export(Heads(function, dtype, size, heads), (), {"input_ids": tokens}, dynamic_shapes=dynamic)
        )
    return Traced(program, (InputSpec("input_ids", 1, 12, 12, 12) if static else InputSpec("input_ids", 1, 1, 16, 32),))


def lowered(traced: Traced, precision: str = "fp16") -> compile.Lowered:
    return compile.lower(load_stack(), traced.program, traced.inputs, BACKEND, precision)


def test_no_constant_of_the_length_squared_is_left_of_a_mask_that_was_proved() -> None:
    traced = tiny.traced("llama", "fp16", lengths=(512, 512))
    graph = lowered(Traced(rewrite(traced.program, "detect_causal", "mask").program, traced.inputs)).graph
    natives = [node for node in graph.graph.nodes if node.target is ops.NATIVE]
    assert [(node.args[3], node.args[4]) for node in natives] == [(None, "upper_left")] * 2
    assert not [tensor.shape for tensor in (*graph.buffers(), *graph.parameters()) if tensor.shape[-2:] == (512, 512)]


def claiming(causal: str) -> compile.Lowered:
    return lowered(small(lambda q, k, v: ops.native(q, k, v, None, causal, 1.0)))


@pytest.mark.parametrize("causal", ["none", "upper_left", "lower_right"])
def test_a_layer_is_what_was_asked_for(causal: str) -> None:
    stack = load_stack()
    made = compile.interpret(stack, claiming(causal), compile.ours())
    (layer,) = made.native_layers
    assert (layer.causal, layer.masked, layer.fused, layer.form.heads) == (causal, False, True, (2, 2))
    assert_consistent(build_engine(stack, made, on))


def test_torchs_is_causal_becomes_upper_left() -> None:
    given = small(lambda q, k, v: scaled_dot_product_attention(q[:, :, 8:], k, v, is_causal=True), static=True)
    (layer,) = network(given, "lowering", "keep").native_layers
    assert layer.causal == "upper_left"


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "bool, 4-D": lambda q: (torch.arange(q.shape[2])[:, None] < torch.arange(q.shape[2]) + 2)[None, None],
    "bool, 2-D": lambda q: torch.arange(q.shape[2])[:, None] < torch.arange(q.shape[2]) + 2,
    "one row for all queries": lambda q: (torch.arange(q.shape[2]) < 5)[None, None, None],
    "float of the query's type": lambda q: q @ q.transpose(-2, -1),
    "float, one head for all": lambda q: (q @ q.transpose(-2, -1))[:, :1],
}


@pytest.mark.parametrize(
    ("name", "static"), [*((name, False) for name in MASKS), ("bool, 4-D", True), ("one row for all queries", True)]
)
def test_a_mask_of_any_form_reaches_the_layer(name: str, static: bool) -> None:
    given = small(lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=MASKS[name](q)), static=static)
    made = network(given, "mask_input")
    assert [(layer.causal, layer.masked) for layer in made.native_layers] == [("none", True)]
    (layer,) = layers(made, "ATTENTION_INPUT")
    assert len(layer.get_input(3).shape) == 4
    assert_consistent(build_engine(load_stack(), made, on))


def test_a_layer_that_dropped_its_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # What TensorRT itself does with a mask that is assigned to a causal layer: nothing, and says nothing.
    add_layer = attention.add_layer
    monkeypatch.setattr(
        attention, "add_layer", lambda stack, net, qkv, causal: add_layer(stack, net, qkv, "upper_left")
    )
    given = small(lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=MASKS["bool, 4-D"](q)))
    with pytest.raises(
        RunError, match=r"asked for causal=none, mask=True; got .*causal='upper_left', masked=False"
    ) as e:
        network(given, "mask_input")
    assert e.value.kind == "conversion"


def test_a_scale_that_cannot_be_folded_is_a_factor_for_each_channel() -> None:
    given = small(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3), size=32)
    made = network(given, "detect_causal", "mask")
    assert [layer.causal for layer in made.native_layers] == ["upper_left"]
    (scaled,) = (layer for layer in layers(made, "ELEMENTWISE") if layer.name.endswith("[scaled query]"))
    assert tuple(scaled.get_input(1).shape) == (1, 1, 1, 32)


def test_an_op_without_converter_ends_the_run_by_name() -> None:
    given = small(
        lambda q, k, v: torch.linalg.svdvals(scaled_dot_product_attention(q, k, v)), torch.float32, static=True
    )
    with pytest.raises(RunError, match="svd") as error:
        network(given, "mask_input", precision="fp32")
    assert error.value.kind == "unsupported_op"


def test_a_build_that_is_told_to_stop_stops() -> None:
    made = compile.interpret(load_stack(), claiming("upper_left"), compile.ours())
    with pytest.raises(RunError) as error:
        build_engine(load_stack(), made, lambda *step: False)
    assert error.value.kind == "build"


def test_a_network_can_be_built_again() -> None:
    made = compile.interpret(load_stack(), claiming("upper_left"), compile.ours())
    for _ in range(2):
        assert_consistent(build_engine(load_stack(), made, on))
