"""Which attention layers have a fused kernel is found out by real builds, ahead of time where there is no GPU."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import save_tiny_llama
from rich.console import Console
from runs import DONE, do, failure
from test_compile import lowered, network, on, small
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import passes
from passes.errors import RunError
from passes.graph import ops
from passes.private.of_torch_tensorrt import builder_config
from passes.tensorrt import fused_kernels
from passes.tensorrt.fused_kernels import Asked, FusedKernels
from passes.tensorrt.versions import load_stack, quiet
from pipeline.config.schema import BackendConfig
from pipeline.engine import kernel_cache, unfused
from pipeline.engine import network as compile
from pipeline.engine.build import build_engine
from pipeline.record.console import StageDisplay
from pipeline.store.entries import Store
from pipeline.store.reuse import Place

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.native(q, k, v, None, "upper_left", 1.0)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two query heads a key head."""
    return causal(torch.cat([q, q], 1), k, v)


def lower_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.native(q, k, v, None, "lower_right", 1.0)


def last_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.native(q[:, :, -1:], k, v, None, "none", 1.0)


def bool_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.arange(q.shape[2])[:, None] < torch.arange(q.shape[2]) + 2
    return sdpa(q, k, v, attn_mask=seen, scale=1.0)


def added_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=q @ k.transpose(-2, -1), scale=1.0)


class Insisting(FusedKernels):
    """Has every layer asked to be one fused kernel, so that the build of the whole network says whether there is."""

    def why_not(self, stack: Any, settings: Any, asked: Asked) -> str | None:
        return None


FORMS = [  # attention, type, heads, head size, static, whether TensorRT-RTX 1.6's default targets have a kernel
    (causal, torch.float16, 2, 16, True, True),
    (causal, torch.float16, 2, 16, False, True),
    (causal, torch.float16, 2, 20, True, True),
    (causal, torch.float16, 2, 8, True, False),
    (causal, torch.bfloat16, 2, 256, False, True),
    (causal, torch.bfloat16, 2, 264, False, False),
    (causal, torch.float32, 2, 64, True, False),
    (causal, torch.float16, 1, 64, True, False),
    (causal, torch.float16, 1, 64, False, False),
    (lower_right, torch.float16, 2, 128, True, True),
    (bool_mask, torch.float16, 2, 64, False, True),
    (bool_mask, torch.float32, 2, 64, True, False),
    (added_mask, torch.bfloat16, 2, 64, True, True),
    (added_mask, torch.float16, 1, 64, False, False),
    (last_query, torch.float16, 2, 64, False, False),
    (last_query, torch.float16, 4, 64, True, True),
]


@pytest.mark.parametrize(("attention", "dtype", "heads", "size", "static", "fused"), FORMS)
def test_the_layer_alone_is_refused_exactly_where_the_whole_network_is(
    attention: Attention, dtype: torch.dtype, heads: int, size: int, static: bool, fused: bool
) -> None:
    graph = lowered(small(attention, dtype, size, static, heads))
    insisted = compile.interpret(load_stack(), graph, compile.ours(kernels=Insisting()))
    made = compile.interpret(load_stack(), graph, compile.ours())
    (layer,) = made.native_layers
    if torch.cuda.is_available():  # another target, another answer, and right all the same
        fused = layer.fused

    assert [layer.fused for layer in insisted.native_layers] == [True]
    if fused:
        assert build_engine(load_stack(), insisted, on).engine.bytes
    else:
        with pytest.raises(RunError, match="not supported by a dedicated kernel") as error:
            build_engine(load_stack(), insisted, on)
        assert error.value.kind == "build"
        assert build_engine(load_stack(), made, on).engine.bytes
    assert layer.fused == fused == (layer.why_unfused is None)
    assert layer.form.keys == ((12, 12) if static else (1, 32)) and layer.form.heads == (heads, heads)
    assert layer.form.queries == ((1, 1) if attention is last_query else layer.form.keys)
    assert (made.contents.iattention_fused, len(made.contents.notes)) == (int(fused), int(not fused))


def test_what_is_not_fused_is_said_with_its_layers_its_form_and_tensorrts_reason() -> None:
    made = network(tiny.traced("llama"), "lowering", "keep", "fp32").contents
    (found,) = made.unfused
    assert len(found.layers) == 2 and all("scaled_dot_product" in name for name in found.layers)
    assert found.form == "fp32, causal, 4 query and 2 key heads of 16, batch 1, 1..64 x 1..64 tokens"
    assert found.reason.startswith("IBuilder::buildSerializedNetwork: Error Code 1")
    (note,) = made.notes
    assert note.startswith("2 of 2 attention layers have no fused kernel ") and found.form in note
    assert note.endswith("(Attention operation was not supported by a dedicated kernel)")
    with pytest.raises(
        RunError, match=rf"require_fused=true: .*{found.layers[1]} of engine.trt: fp32, causal"
    ) as error:
        unfused.refuse({"engine": made}, {})
    assert error.value.kind == "unfused"


# The builder's configuration


def aimed_at(capability: str) -> Callable[[Any], Any]:
    """Makes Torch-TensorRT's configuration of the builder, for one compute capability."""

    def configure(interpreter: Any) -> Any:
        config = builder_config(interpreter)
        config.num_compute_capabilities = 1
        assert config.set_compute_capability(getattr(load_stack().trt.ComputeCapability, capability), 0)
        return config

    return configure


def test_the_layer_alone_is_built_for_what_the_network_is_built_for() -> None:
    """Turing has no bf16 at all: where nothing can be built, that is no answer, and the build itself says why."""
    kernels = FusedKernels(configure=aimed_at("SM75"))
    half, brain = (small(causal, dtype, static=True) for dtype in (torch.float16, torch.bfloat16))

    made = compile.interpret(load_stack(), lowered(half), compile.ours(kernels=kernels))
    engine = build_engine(load_stack(), made, on).engine
    assert (engine.iattention_fused, engine.notes) == (1, ()) and len(kernels.answers) == 1
    assert torch.cuda.is_available() or engine.target == "ahead of time, SM75"

    made = compile.interpret(load_stack(), lowered(brain), compile.ours(kernels=kernels))
    with pytest.raises(RunError, match=r"Cannot compile for target\(s\) sm75"):
        build_engine(load_stack(), made, on)
    assert len(kernels.answers) == 1 and made.contents.unfused == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that PyTorch can use")
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
    reason="TensorRT-RTX 1.6 has fused kernels for this compute capability",
)
def test_on_a_gpu_without_fused_kernels_the_layers_are_decomposed_and_the_report_says_which() -> None:
    kernels = FusedKernels(configure=aimed_at("CURRENT"))  # 9.0: by default it builds for what has kernels there
    traced = small(grouped, size=64)  # one of as many key heads it has a kernel for

    insisted = compile.interpret(
        load_stack(), lowered(traced), compile.ours(kernels=Insisting(configure=kernels.configure))
    )
    with pytest.raises(RunError, match="not supported by a dedicated kernel"):
        build_engine(load_stack(), insisted, on)

    made = compile.interpret(load_stack(), lowered(traced), compile.ours(kernels=kernels))
    engine = build_engine(load_stack(), made, on).engine
    assert engine.iattention_fused == 0 and engine.unfused[0].layers == ("native",)
    assert f"1 of 1 attention layers have no fused kernel on {torch.cuda.get_device_name()}" in engine.notes[0]
    assert compile.interpret(load_stack(), lowered(traced), compile.ours()).contents.unfused == ()


# Asked once


class Counted:
    """Makes the builder's configuration, and counts how often: once a network that is built."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, interpreter: Any) -> Any:
        self.count += 1
        return builder_config(interpreter)


def test_layers_of_one_form_are_asked_about_once() -> None:
    counted = Counted()
    kernels = FusedKernels(configure=counted)
    graph = lowered(small(lambda q, k, v: causal(causal(causal(q, k, v), k, v), k, v), static=True))
    for _ in range(2):
        made = compile.interpret(load_stack(), graph, compile.ours(kernels=kernels))
        assert [layer.fused for layer in made.native_layers] == [True] * 3
    assert counted.count == 1
    compile.interpret(load_stack(), lowered(small(lower_right, static=True)), compile.ours(kernels=kernels))
    assert counted.count == 2


def test_answers_are_kept_for_the_next_process_and_hold_for_the_same_settings(tmp_path: Path) -> None:
    path, graph = tmp_path / "fused.json", lowered(small(causal, torch.float32, static=True))

    def asked(low: compile.Lowered) -> tuple[int, str | None]:
        with kernel_cache.fused_kernels(path) as kernels:
            kernels.configure = counted = Counted()
            asked_for = Asked("fp32", (1, 1), (2, 2), (12, 12), (12, 12), 16, "upper_left", None)
            return_value = kernels.why_not(load_stack(), low.settings, asked_for)
            return counted.count, return_value

    count, reason = asked(graph)
    assert count == 2 and reason is not None, "refused, and then built decomposable"
    assert asked(graph) == (0, reason)
    otherwise = compile.lower(
        load_stack(), small(causal, torch.float32, static=True).program, graph.inputs,
        BackendConfig("tensorrt", optimization_level=1), "fp32",
    )  # fmt: skip
    assert asked(otherwise) == (2, reason) and len(json.loads(path.read_text())) == 2

    for damage in ("{", "[]", '{"a": 1}'):
        path.write_text(damage)
        assert asked(graph) == (2, reason)


def test_answers_of_another_version_gpu_or_code_are_not_looked_at(tmp_path: Path) -> None:
    here = {"versions": {"tensorrt": "1.6", "flavour": "tensorrt_rtx"}, "target": "ahead of time", "code": "a"}
    others = [
        here | {"versions": {"tensorrt": "1.7", "flavour": "tensorrt_rtx"}},
        here | {"target": "NVIDIA H100 (compute capability 9.0)"},
        here | {"code": "b"},
    ]
    store = Store(tmp_path, 2**30)
    paths = [Place(tmp_path, store, each | {"strategy": each}).fused_kernels for each in (here, *others)]
    assert len(set(paths)) == 4 and all(path is not None and path.parent == tmp_path for path in paths)
    assert Place(tmp_path, store, here | {"strategy": "another"}).fused_kernels == paths[0]
    assert Place(tmp_path).fused_kernels is None


# Whole runs


def test_a_run_whose_layers_have_no_fused_kernel_says_so_or_ends_where_they_must(store: str, tmp_path: Path) -> None:
    """One head of one sequence: every build of it died."""
    model = save_tiny_llama(tmp_path / "one-head", num_attention_heads=1, num_key_value_heads=1)
    settings = [
        "shape=static", "shape.max=32", "benchmark=none", "store.enabled=true", f"store.folder={tmp_path / 'engines'}",
    ]  # fmt: skip
    screen = io.StringIO()
    outcome = do(store, tmp_path, model, *settings, display=StageDisplay(Console(file=screen, width=400)))

    assert outcome.report["status"] == DONE, outcome.report["failure"]
    engine, said = outcome.report["engine"], "2 of 2 attention layers have no fused kernel"
    assert (engine["iattention"], engine["iattention_fused"]) == (2, 0)
    assert [len(each["layers"]) for each in engine["unfused"]] == [2] and said in engine["notes"][0]
    assert engine["notes"][0] in screen.getvalue()
    (kept,) = (tmp_path / "engines").glob("fused-*.json")
    assert list(json.loads(kept.read_text()).values()) == [engine["unfused"][0]["reason"]]

    outcome = do(store, tmp_path, model, *settings, "strategy.require_fused=true")
    assert failure(outcome) == ("interpret", "unfused")
    assert engine["unfused"] == outcome.report["engine"]["unfused"] and outcome.report["engine"]["file"] is None
    assert all(name in outcome.report["failure"]["message"] for name in engine["unfused"][0]["layers"])


def test_scripts_of_ones_own_get_an_engine_and_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    torch_tensorrt = passes.load_torch_tensorrt()
    from torch_tensorrt.dynamo.conversion import TRTInterpreter

    graph = lowered(small(lambda q, k, v: sdpa(q, k, sdpa(q, k, v)), size=40, static=True, heads=1)).graph
    settings = torch_tensorrt.dynamo.CompilationSettings(device=torch_tensorrt.Device(gpu_id=0))
    inputs = [torch_tensorrt.Input(shape=(1, 12), dtype=torch.int64, name="input_ids")]
    fused_kernels.of_this_process.cache_clear()
    with caplog.at_level(logging.WARNING, "passes"):
        for _ in range(2):
            with passes.native_attention(), torch.no_grad():
                interpreter = TRTInterpreter(graph, inputs, compilation_settings=settings)
                torch.fx.Interpreter.run(interpreter)
    with quiet():
        engine = interpreter.builder.build_serialized_network(interpreter.ctx.net, builder_config(interpreter))
    assert engine is not None
    warned = [record.message for record in caplog.records if record.name.startswith("passes")]
    assert len(warned) == 1 and "no fused kernel for fp16, no mask, 1 query and 1 key heads of 40" in warned[0]
