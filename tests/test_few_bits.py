"""Weights of fewer bits: rounded, in the graph, and held by real engines as they are."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from conftest import save_tiny_llama
from runs import do
from torch.export import ExportedProgram

from passes.errors import UserError
from passes.graph.rewrite import in_aten, rewrite
from passes.precision import FEW_BITS, PRECISIONS
from passes.quantised import DEQUANTISED, LARGEST, LOWEST, QuantisedWeight, to_nearest
from passes.tensorrt.versions import load_stack
from pipeline.__main__ import compose_config
from pipeline.config.axes import axes
from pipeline.config.quantize import CalibrationConfig, QuantizeConfig
from pipeline.config.schema import BackendConfig, CacheConfig, ModelConfig, ShapeConfig
from pipeline.engine import network, programs
from pipeline.engine.build import build_engine
from pipeline.measure.roofline import decode_floor_s, decoder_cost, prefill_bytes, with_few_bits
from pipeline.model import few_bits
from pipeline.model.calibration import samples
from pipeline.model.load import LoadedModel, load, load_reference
from pipeline.model.quantise import quantised
from pipeline.record.console import described
from pipeline.sweep.estimate import device_bytes
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


@pytest.mark.parametrize(("kind", "block", "error"), [("int8", None, 0.01), ("int4", 128, 0.12), ("e4m3", None, 0.03)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_as_near_as_the_type_allows(kind: Any, block: int | None, error: float, dtype: torch.dtype) -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    weight[3] *= 1e-3  # a channel of its own size
    small = to_nearest(weight, kind, block, dtype)
    back, steps = small.dequantised(torch.float32), small.scales.repeat_interleave(256 // small.scales.shape[1], 1)

    values, lowest = small.values.float(), LOWEST.get(kind, LARGEST[kind])
    assert -lowest <= values.min() < -0.8 * lowest and 0.9 * LARGEST[kind] < values.max() <= LARGEST[kind]
    assert small.block == block
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


@pytest.mark.parametrize("number_type", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
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


def test_a_trace_leaves_the_model_as_it_was() -> None:
    loaded = made("fp8")
    before = {name: (type(each), list(each._buffers)) for name, each in loaded.model.named_modules()}
    weights = {name: each.data_ptr() for name, each in loaded.model.named_parameters()}
    traced(loaded)
    assert {name: (type(each), list(each._buffers)) for name, each in loaded.model.named_modules()} == before
    assert {name: each.data_ptr() for name, each in loaded.model.named_parameters()} == weights
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_what_is_put_into_a_layer_takes_the_place_of_what_was_put_there_before() -> None:
    model: Any = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False)).requires_grad_(False)
    small = to_nearest(torch.randn(32, 64), "e4m3", None, torch.float32)
    factors, rows = torch.linspace(0.5, 2.0, 64), torch.randn(3, 64)

    few_bits.put(model, {"0": replace(small, row_factors=factors)})
    few_bits.put(model, {"0": replace(small, row_factors=factors)})
    torch.testing.assert_close(model(rows), (rows * factors) @ small.dequantised(torch.float32).T)

    few_bits.put(model, {"0": small})
    torch.testing.assert_close(model(rows), rows @ small.dequantised(torch.float32).T)


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


def test_what_reads_one_table_reads_one_dequantisation() -> None:
    net = network_of("int8_weights").interpreter.ctx.net
    kinds = [net.get_layer(i).type for i in range(net.num_layers)]
    # Query, key, value, output; gate and up of the one row that is read, as one; down; the table of head and embedding.
    assert kinds.count(load_stack().trt.LayerType.DEQUANTIZE) == 7


@pytest.mark.parametrize("precision", KINDS)
def test_weights_that_are_written_out_are_multiplied_with_the_same_rows(precision: str) -> None:
    net = network_of(precision, small=False).interpreter.ctx.net
    kinds = [net.get_layer(i).type for i in range(net.num_layers)]
    layer = load_stack().trt.LayerType
    # Rows of query, key and value; of the output; of gate and up; of down.
    assert kinds.count(layer.QUANTIZE) == kinds.count(layer.DEQUANTIZE) == (4 if precision == "fp8" else 0)


@pytest.fixture(scope="module")
def whole(store: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a generation whose prompt runs on the same weights in fp16."""
    folder = tmp_path_factory.mktemp("few_bits")
    model = save_tiny_llama(folder / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    settings = ["precision=int8_weights", "quantize.prompt=fp16", "quantize.without=[lm_head]", "cache=in_engine"]
    asked = ["shape=static", "shape.max=24", "benchmark=generate", "benchmark.shapes=[]", "verify.quality=false"]
    lengths = ["benchmark.generate.input_length=24", "benchmark.generate.output_length=4"]
    return do(store, folder, model, *settings, *asked, *lengths).report


def test_a_prompts_engine_may_hold_the_same_weights_in_the_wider_type(whole: dict[str, Any]) -> None:
    assert whole["failure"] is None and whole["verify"]["passed"] and whole["verify"]["generation"]["passed"]
    products = 256 * (4 * 16 + 2 * 2 * 16) + 4 * 16 * 256 + 3 * 256 * 512
    assert whole["decode"]["engine"]["weights"]["int8"] == products
    assert "int8" not in whole["engine"]["weights"] and whole["engine"]["weights"]["half"] >= 2 * products


def test_the_console_says_what_each_engine_holds(whole: dict[str, Any]) -> None:
    (line,) = (line for line in described(whole).splitlines() if line.startswith("| weights"))
    assert "engine: half 1.0 MB" in line and "decode: half 0.1 MB, int8 0.4 MB" in line
    fp16 = {**whole, "engine": {**whole["engine"]}, "decode": None}
    assert "| weights" not in described(fp16)


# What knows of it


def test_the_roofline_of_a_step_reads_the_small_weights() -> None:
    loaded = made("int4_weights")
    cost = decoder_cost(loaded.model, "last")
    assert cost is not None
    small = with_few_bits(cost, loaded.model, loaded.quantised, prompt=False, step=True)
    assert small is not None and small.prompt_weights is None and prefill_bytes(small) == 2 * (TABLE + PRODUCTS)
    scales = 512 + PRODUCTS // 128  # of the table a token each
    assert small.step_weights == TABLE + PRODUCTS // 2 + 2 * scales
    rates = {"batch": 1, "cache_length": 1, "copy_gb_per_s": 1e-9, "matmul_tflops": 1e9}
    assert decode_floor_s(small, **rates) == small.step_weights + 2 * 2 * 2 * 64  # and one token's keys and values


def test_rows_differ_by_what_was_asked_of_their_weights_alone() -> None:
    def of(*overrides: str) -> dict[str, str]:
        return {k: v for k, v in axes(compose_config(list(overrides)).to_dict()).items() if k.startswith("quantize")}

    assert of("precision=fp16") == of("precision=int8_weights") == of("precision=fp8") == {}
    assert of("precision=int8_weights", "quantize.without=[lm_head]") == {"quantize.without": "[lm_head]"}
    longer = of("precision=fp8", "quantize.calibration.length=64", "quantize.base=bf16")
    assert longer == {"quantize.base": "bf16", "quantize.calibration.length": "64"}


def test_device_memory_knows_the_bits() -> None:
    config = compose_config(["model=llama3_1b", "model.weights=random", "precision=int4_weights"])
    # A copy in fp16 and one in fp32 for PyTorch, one with a byte each, and the engine.
    assert device_bytes(config, {}) == (2 + 4 + 1 + 0.5) * 1_235_814_400 + 8 * 128_256


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
    class Words:
        bos_token_id = None

        def __call__(self, text: str, **_: Any) -> Any:
            return type("Encoded", (), {"input_ids": list(range(len(text.split())))})

    text = tmp_path / "short.txt"
    text.write_text("a few words")
    asked = CalibrationConfig(str(text), samples=2, length=16)
    loaded = replace(load(form(), "fp16", CPU, 0, lambda _: None), tokenizer=Words())
    with pytest.raises(UserError, match=r"calibration.text=.*short.txt: holds 3 tokens .* at least 32 are needed"):
        samples(loaded, asked, 0)
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"calibration.text=.*short.txt: cannot be read \(it is no UTF-8\)"):
        samples(loaded, asked, 0)


def test_awq_errs_less_than_rounding_where_some_channels_are_larger_than_others() -> None:
    pytest.importorskip("modelopt")

    def of(method: str | None) -> LoadedModel:
        loaded = load(form(), "fp16", CPU, 0, lambda _: None)
        loaded.model.model.layers[0].post_attention_layernorm.weight[::64] *= 30
        asked = QuantizeConfig(method=method, calibration=CalibrationConfig(samples=2, length=32))
        return quantised(loaded, "int4_weights", "fp16", asked, 0, lambda _: None) if method else loaded

    exact, plain, searched = of(None), of("round"), of("awq")
    small = searched.quantised["model.layers.0.mlp.gate_proj"]
    assert small.row_factors is not None and float(small.row_factors[::64].max()) < float(small.row_factors.median())
    rows = torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    rows[:, ::64] *= 30
    with torch.no_grad():
        layers = [each.model.float().get_submodule("model.layers.0.mlp.gate_proj") for each in (exact, plain, searched)]
        truth, *others = (layer(rows) for layer in layers)
    errors = [float((found - truth).norm()) for found in others]
    assert errors[1] < 0.9 * errors[0]
