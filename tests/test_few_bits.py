"""Weights of fewer bits: rounded, in the graph, and held by real engines as they are."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from torch.export import ExportedProgram

from passes.errors import UserError
from passes.graph.rewrite import in_aten, rewrite
from passes.precision import FEW_BITS, PRECISIONS
from passes.quantised import DEQUANTISED, LARGEST, QuantisedWeight, to_nearest
from passes.tensorrt.versions import load_stack
from pipeline.config.quantize import CalibrationConfig, QuantizeConfig
from pipeline.config.schema import BackendConfig, CacheConfig, ModelConfig, ShapeConfig
from pipeline.engine import network, programs
from pipeline.engine.build import build_engine
from pipeline.model import few_bits
from pipeline.model.load import LoadedModel, load, load_reference
from pipeline.model.quantise import quantised
from pipeline.verify.arithmetic import on_cpu

SIZES: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "head_dim": 64, "vocab_size": 512,
    "tie_word_embeddings": True, "num_hidden_layers": 1,
}  # fmt: skip
TABLE, PRODUCTS = 512 * 512, 512 * (2 * 512 + 2 * 128 + 3 * 1536)
"""Weights of the embedding that the head shares, and of the layer's products."""
KERNELS = 2_500_000
"""Bytes, at the most, of what else such an engine has in it, whatever its sizes."""
CPU = torch.device("cpu")
KINDS = list(FEW_BITS)


def form(**changes: Any) -> ModelConfig:
    return replace(tiny.config("llama", **SIZES | changes), logits="all")


def made(precision: str, number_type: str = "fp16", asked: QuantizeConfig | None = None, **changes: Any) -> LoadedModel:
    loaded = load(form(**changes), number_type, CPU, 0, lambda _: None)
    asked = asked or QuantizeConfig(calibration=CalibrationConfig(samples=2, length=16))
    return quantised(loaded, precision, number_type, asked, 0, lambda _: None)


def traced(loaded: LoadedModel, cache: Any = None, logits: str = "all") -> dict[str, Any]:
    asked, shape = replace(form(), logits=logits), ShapeConfig("static", 1, 24, 24, 24)
    return {n: trace() for n, trace in programs.parts(loaded.model, asked, shape, cache, loaded.quantised).items()}


@cache
def network_of(precision: str, number_type: str = "fp16", small: bool = True) -> network.Network:
    (each,) = traced(made(precision, number_type), logits="last").values()
    program = rewrite(each.program, "detect_causal", "mask").program
    stack = load_stack()
    lowered = network.lower(stack, program, each.inputs, BackendConfig("tensorrt"), number_type, small)
    return network.interpret(stack, lowered, network.ours())


def weights_of(program: ExportedProgram) -> list[str]:
    return [node.args[2] for node in program.graph.nodes if node.target is DEQUANTISED]


# Rounding


@pytest.mark.parametrize(("kind", "block", "error"), [("int8", None, 0.01), ("int4", 128, 0.13), ("e4m3", None, 0.03)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_as_near_as_the_type_allows(kind: Any, block: int | None, error: float, dtype: torch.dtype) -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    weight[3] *= 1e-3  # a channel of its own size
    small = to_nearest(weight, kind, block, dtype)
    back, steps = small.dequantised(torch.float32), small.scales.repeat_interleave(256 // small.scales.shape[1], 1)

    assert small.values.float().abs().max() <= LARGEST[kind] and small.block == block
    parts = torch.frexp(small.scales)[0]
    assert torch.equal(parts.to(dtype).float(), parts)  # an engine multiplies by the same
    assert 0.1 * error < float((back - weight).norm() / weight.norm()) < error
    assert float((back[3] - weight[3]).norm() / weight[3].norm()) < error
    if kind != "e4m3":
        cut = torch.finfo(dtype).eps * LARGEST[kind]  # a scale that was rounded down cuts off the largest
        assert bool(((back - weight).abs() <= steps * (0.5 + cut)).all())


def test_a_channel_of_zeros_stays_one() -> None:
    small = to_nearest(torch.zeros(2, 8), "int8", None, torch.float16)
    assert bool((small.dequantised(torch.float16) == 0).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(4, 8)}, "must be a matrix of torch.int8"),
        ({"scales": torch.ones(4, 3)}, "do not fit values"),
        ({"scales": torch.full((4, 1), torch.nan)}, "not all finite and above 0"),
        ({"scales": torch.zeros(4, 1)}, "not all finite and above 0"),
        ({"row_factors": torch.ones(7)}, "factors do not fit rows of 8"),
    ],
)
def test_parts_that_make_no_weight_are_refused(change: dict[str, Any], message: str) -> None:
    whole = to_nearest(torch.ones(4, 8), "int8", None, torch.float16)
    with pytest.raises(ValueError, match=message):
        QuantisedWeight(**{**vars(whole), **change})


# In the model and in its graph


@pytest.mark.parametrize("number_type", ["fp16", "bf16"])
@pytest.mark.parametrize("precision", KINDS)
def test_the_graph_holds_the_small_weights_and_computes_what_eager_pytorch_does(
    precision: str, number_type: str
) -> None:
    loaded = made(precision, number_type)
    (each,) = traced(loaded).values()
    program = rewrite(each.program, "detect_causal", "mask").program
    tokens = tiny.tokens(1, 24)
    with torch.no_grad(), on_cpu(number_type)():
        ours, eager = program.module()(input_ids=tokens), loaded.model(input_ids=tokens, use_cache=False).logits

    assert torch.equal(ours, eager)
    kinds = weights_of(program)  # the table that the head shares is read twice
    assert kinds.count("int8") == (9 if precision == "int8_weights" else 2) and len(kinds) == 9
    large = [k for k, v in program.state_dict.items() if v.dim() == 2 and v.dtype == PRECISIONS[number_type].dtype]
    assert large == []  # no weight is there twice


@pytest.mark.parametrize("precision", KINDS)
def test_a_trace_leaves_the_model_as_it_was(precision: str) -> None:
    loaded = made(precision)
    before = {name: (type(each), list(each._buffers)) for name, each in loaded.model.named_modules()}
    weights = {name: each.data_ptr() for name, each in loaded.model.named_parameters()}
    traced(loaded)
    assert {name: (type(each), list(each._buffers)) for name, each in loaded.model.named_modules()} == before
    assert {name: each.data_ptr() for name, each in loaded.model.named_parameters()} == weights
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_the_reference_has_the_same_numbers_one_type_wider() -> None:
    loaded = made("int4_weights")
    wide = load_reference(form(), "fp16", CPU, 0)
    few_bits.put(wide, loaded.quantised)
    for name, small in loaded.quantised.items():
        weight: Any = wide.get_submodule(name).weight
        assert weight.dtype == torch.float32 and torch.equal(weight, small.dequantised(torch.float32))
        assert torch.equal(loaded.model.get_submodule(name).weight, weight.half())


def test_a_graph_of_torch_alone_holds_the_small_weights_too() -> None:
    loaded = made("fp8")
    (each,) = traced(loaded).values()
    plain = in_aten(rewrite(each.program, "detect_causal", "mask").program)
    assert not [node for node in plain.graph.nodes if "proved_attention" in str(node.target)]
    assert {v.dtype for v in plain.state_dict.values() if v.dim() == 2 and v.shape[1] > 1} == {
        torch.float8_e4m3fn, torch.int8,
    }  # fmt: skip


# In an engine


@pytest.mark.parametrize("number_type", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", KINDS)
def test_the_engine_holds_the_small_weights_and_its_size_shows_it(precision: str, number_type: str) -> None:
    few, made_of = FEW_BITS[precision], network_of(precision, number_type)
    engine = build_engine(load_stack(), made_of, lambda *_: True).engine
    wide = {"fp16": "half", "bf16": "bf16"}[number_type]
    held = {"int8": TABLE + PRODUCTS} if few.kind == "int8" else {
        "int8": TABLE, {"e4m3": "fp8"}.get(few.kind, few.kind): PRODUCTS * few.bits // 8,
    }  # fmt: skip

    assert {kind: engine.weights[kind] for kind in held} == held
    assert engine.weights[wide] < 0.02 * 2 * PRODUCTS  # norms and scales
    assert sum(held.values()) < engine.bytes < sum(held.values()) + KERNELS < 2 * (TABLE + PRODUCTS)


def test_an_engine_that_holds_the_same_weights_in_the_wider_type_has_no_small_ones() -> None:
    contents = network_of("int8_weights", small=False).contents
    assert "int8" not in contents.weights and contents.weights["half"] >= 2 * (TABLE + PRODUCTS)


def test_a_decode_step_multiplies_its_row_with_few_large_products() -> None:
    """Query, key and value, and gate and up, are one product each, as of the wider type."""
    loaded = made("int8_weights")
    cache = programs.cache_of(loaded.model, CacheConfig("in_engine", 64), ShapeConfig("static", 1, 24, 24, 24), None)
    each = traced(loaded, cache)["decode"]
    program = rewrite(each.program, "detect_causal", "mask").program
    stack = load_stack()
    lowered = network.lower(stack, program, each.inputs, BackendConfig("tensorrt"), "fp16")
    made_of = network.interpret(stack, lowered, network.ours(in_place=True))
    net = made_of.interpreter.ctx.net
    kinds = [net.get_layer(i).type for i in range(net.num_layers)]
    assert kinds.count(stack.trt.LayerType.DEQUANTIZE) == 5  # both, output and down, and the head's table
    assert build_engine(stack, made_of, lambda *_: True).engine.bytes


def test_what_reads_one_table_reads_one_dequantisation() -> None:
    net = network_of("int8_weights").interpreter.ctx.net
    kinds = [net.get_layer(i).type for i in range(net.num_layers)]
    # Query, key, value, output; gate and up of the one row that is read, as one; down; the table of head and embedding.
    assert kinds.count(load_stack().trt.LayerType.DEQUANTIZE) == 7


# What cannot be had


@pytest.mark.parametrize(
    ("precision", "asked", "changes", "message"),
    [
        ("int8_weights", {"without": ["nothing_like_it"]}, {}, r"quantize.without=nothing_like_it: names no linear"),
        ("int8_weights", {"without": ["*"]}, {}, r"quantize.without=\[\*\]: leaves no layer"),
        ("int4_weights", {"block": 128}, {"intermediate_size": 704}, "blocks of 128 do not divide the input 704 of "
         "model.layers.0.mlp.down_proj; set quantize.block=64"),
        ("int4_weights", {}, {"intermediate_size": 90}, "blocks of 32 do not divide .*leave it out by"),
    ],
)  # fmt: skip
def test_what_cannot_be_quantised_is_said_in_one_line(
    precision: str, asked: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        made(precision, asked=QuantizeConfig(**asked), **changes)
    assert "\n" not in str(caught.value)


def test_a_smaller_block_is_taken_where_the_usual_one_does_not_divide_and_is_said() -> None:
    loaded = made("int4_weights", intermediate_size=704)
    assert loaded.quantised["model.layers.0.mlp.down_proj"].block == 64
    assert "int4_weights in blocks of 64, not 128, which do not divide every layer's input" in loaded.notes


def test_layers_stay_as_they_are_by_name_or_pattern() -> None:
    loaded = made("int8_weights", asked=QuantizeConfig(without=["lm_head", "model.layers.*.mlp.*"]))
    assert sorted(loaded.quantised) == [f"model.layers.0.self_attn.{n}_proj" for n in "koqv"]


def test_a_calibration_text_that_is_too_short_is_refused(tmp_path: Any) -> None:
    from pipeline.model.quantise import _of_file

    class Words:
        def __call__(self, text: str, **_: Any) -> Any:
            return type("Encoded", (), {"input_ids": list(range(len(text.split())))})

    text = tmp_path / "short.txt"
    text.write_text("a few words")
    loaded = replace(load(form(), "fp16", CPU, 0, lambda _: None), tokenizer=Words())
    with pytest.raises(UserError, match=r"short.txt: holds 3 tokens, and samples=2 of length=16 are 32"):
        _of_file(str(text), loaded, 2, 16, 0)
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"short.txt: cannot be read as UTF-8 text"):
        _of_file(str(text), loaded, 2, 16, 0)


def test_awq_keeps_what_the_layers_compute_and_errs_less_than_rounding_where_channels_differ() -> None:
    pytest.importorskip("modelopt")
    asked = QuantizeConfig(method="awq", calibration=CalibrationConfig(samples=2, length=32))
    plain, loaded = made("int4_weights"), made("int4_weights", asked=asked)
    small = loaded.quantised["model.layers.0.mlp.down_proj"]
    assert small.row_factors is not None and not torch.allclose(small.row_factors, torch.ones(()))
    tokens = tiny.tokens(1, 24)
    with torch.no_grad():
        truth = load(form(), "fp32", CPU, 0, lambda _: None).model(input_ids=tokens).logits
        errors = [float((each.model(input_ids=tokens).logits - truth).norm()) for each in (plain, loaded)]
    assert errors[1] < 1.1 * errors[0]
