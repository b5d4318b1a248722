"""Families of decoders that once ended in an internal message: each works, or is refused in one line."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_LLAMA, save_tiny_llama
from rich.console import Console
from runs import DONE, do
from test_compile import layers, network, small
from tiny import length, program_of
from torch import Tensor
from torch.export import export
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from benchmarks import architectures, families
from passes.errors import RunError, UserError
from passes.graph.rewrite import rewrite
from passes.tensorrt import missing, network_form
from passes.tensorrt.versions import load_stack
from pipeline.__main__ import compose_config
from pipeline.config.schema import BackendConfig, CacheConfig, Config, ModelConfig, ShapeConfig
from pipeline.engine import network as compile
from pipeline.engine import programs
from pipeline.engine.build import build_engine
from pipeline.model import load
from pipeline.model.experts import plain_experts
from pipeline.model.load import LoadedModel
from pipeline.model.positions import positions_of
from pipeline.record.console import StageDisplay
from pipeline.run import Outcome
from pipeline.trace import cached_forms
from pipeline.trace.cache_shape import CacheShape
from pipeline.trace.call_form import CallForm, InputSpec, exported, trace

CPU = torch.device("cpu")
SIZES = {"max_position_embeddings": 256, "n_positions": 256, "sliding_window": None}
DEEPSEEK = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v3": {**DEEPSEEK, "first_k_dense_replace": 0, "num_key_value_heads": 4, "head_dim": 16, "n_group": 2},
    "falcon": {"alibi": True},
    "gpt_oss": {"sliding_window": 64},
}
"""DeepSeek V3: queries and keys of 32, values of 16."""


def described(name: str) -> dict[str, Any]:
    """The config of a tiny model: sizes as in the table of masks, every position attended to."""
    architectures.VARIANTS.setdefault(name, (name, {}))
    config = architectures.config(name).to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in config}
    return {**config, **sizes, **OWN.get(name, {}), "model_type": name}


def settings(name: str, cache: str = "none", inputs: tuple[str, ...] = ("input_ids",)) -> Config:
    config = compose_config([f"cache={cache}", "benchmark=none", "shape.min=2", "shape.opt=16", "shape.max=32"])
    config.model = ModelConfig(name, weights="random", inputs=list(inputs), architecture=described(name))
    return config


def loaded(name: str, precision: str = "fp32") -> load.LoadedModel:
    return load.load(settings(name).model, precision, CPU, 0, lambda _: None)


def eager(name: str) -> Any:
    """The model in fp32 with eager attention: GPT-OSS, whose experts have biases and a gate of their own, has no
    other."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**described(name)), attn_implementation="eager")
    return made.float().eval().requires_grad_(False)


def cache_of(config: Config, made: LoadedModel) -> CacheShape | None:
    return programs.cache_of(made.model, config.cache, config.shape, config.benchmark.generate)


def networks(
    name: str, cache: str = "none", inputs: tuple[str, ...] = ("input_ids",), parts: tuple[str, ...] = ("engine",)
) -> dict[str, compile.Network]:
    """The networks of tiny model ``name`` in fp16, by the names of :func:`pipeline.engine.programs.parts`."""
    config, stack, made = settings(name, cache, inputs), load_stack(), loaded(name, "fp16")
    found = {}
    _, traces = programs.with_rings(made.model, config.model, config.shape, cache_of(config, made))
    for part, traced_as in traces.items():
        if part in parts:
            traced = traced_as()
            program = rewrite(traced.program, "detect_causal", "mask").program
            lowered = compile.lower(stack, program, traced.inputs, config.backend, "fp16")
            found[part] = compile.interpret(stack, lowered, compile.ours(cache == "in_engine"))
    return found


def build(network: compile.Network) -> Any:
    return build_engine(load_stack(), network, lambda *_: True).data


# Whole runs


def whole_run(name: str, store: str, tmp_path: Path, *overrides: str) -> Outcome:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(described(name)))
    small = ["model.weights=random", "shape.max=32", "benchmark=none"]
    return do(store, tmp_path / "outputs", folder, *small, *overrides)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        pytest.param("deepseek_v3", ["cache=in_engine"], marks=slow),  # half a minute; its step is built below
        pytest.param("deepseek_v3", ["model.inputs=[input_ids,attention_mask]"], marks=slow),
        pytest.param("mixtral", [], marks=slow),
        pytest.param("mixtral", ["cache=in_engine"], marks=slow),
        pytest.param("qwen3_moe", [], marks=slow),
        pytest.param("qwen3_moe", ["cache=in_engine"], marks=slow),
        pytest.param("gpt2", ["cache=in_engine"], marks=slow),
        pytest.param("gpt2", ["model.inputs=[input_ids,attention_mask]"], marks=slow),
        pytest.param("opt", ["model.inputs=[input_ids,attention_mask]"], marks=slow),
    ],
)
def test_a_family_goes_from_its_config_to_an_engine_that_is_verified(
    name: str, overrides: list[str], store: str, tmp_path: Path
) -> None:
    report = whole_run(name, store, tmp_path, *overrides).report

    assert (report["status"], report["failure"]) == (DONE, None)
    assert report["verify"]["passed"] and report["engine"]["bytes"] > 0
    assert report["attention"]["summary"]["by_action"].keys() <= {"native_causal", "native_mask"}
    if "cache=in_engine" in overrides:
        # DeepSeek's cache holds latents, of which keys are made anew: no attention over the cache as it lies.
        action = "decomposed" if name == "deepseek_v3" else "cached"
        assert report["decode"]["attention"]["summary"]["by_action"] == {action: 1}


# Mixtures of experts


@pytest.mark.parametrize("name", [pytest.param("mixtral", marks=slow), "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("tokens", [1, 9], ids=["gathered", "every expert"])
def test_experts_as_plain_products_are_the_experts(name: str, tokens: int) -> None:
    made = eager(name)
    ids, before = torch.arange(tokens)[None] + 3, made.get_experts_implementation()
    expected = made(input_ids=ids).logits

    with plain_experts(made):
        program = export(CallForm(made, "all"), (ids,), strict=False)
        torch.testing.assert_close(made(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)

    assert made.get_experts_implementation() == before
    assert not any("grouped_mm" in str(node.target) for node in program.graph.nodes)
    assert any("bmm" in str(node.target) or "matmul" in str(node.target) for node in program.graph.nodes)


def test_an_expert_that_was_not_chosen_may_overflow() -> None:
    made = loaded("mixtral").model
    layer, ids = made.model.layers[0].mlp, torch.arange(9)[None] + 3
    with torch.no_grad():
        layer.gate.weight.zero_()  # equal scores: the first experts are chosen
        chosen = {int(i) for i in layer.gate(torch.zeros(1, 32))[-1].flatten()}
        (spare, *_) = set(range(4)) - chosen
        expected = made(input_ids=ids).logits
        layer.experts.down_proj[spare] = torch.inf

        with plain_experts(made):
            torch.testing.assert_close(made(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


# What TensorRT is given


def test_positions_that_are_summed_from_a_mask_stay_whole_numbers() -> None:
    (network,) = networks("opt", inputs=("input_ids", "attention_mask")).values()
    net, kinds = network.interpreter.ctx.net, load_stack().trt.LayerType
    sums = [layer for layer in map(net.get_layer, range(net.num_layers)) if layer.type == kinds.CUMULATIVE]
    assert [layer.get_output(0).dtype for layer in sums] == [load_stack().trt.int64]


def test_the_decode_step_of_a_model_that_leaves_its_heads_open_is_built() -> None:
    assert build(networks("gpt2", "in_engine", parts=("decode",))["decode"]) is not None


def lowered(function: Any, *inputs: Tensor) -> compile.Lowered:
    """A program of ``function``, whose inputs have a dynamic second axis, lowered."""
    program = program_of(function, *inputs, dynamic=tuple({1: length(2, 12)} for _ in inputs))
    names = program.graph_signature.user_inputs
    specs = [
        InputSpec(str(n), 1, 2, 8, 12, dtype=str(x.dtype).split(".")[1]) for n, x in zip(names, inputs, strict=True)
    ]
    return compile.lower(load_stack(), program, tuple(specs), BackendConfig("tensorrt"), "fp32")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bool])
def test_a_running_sum_has_the_type_that_it_has_in_pytorch(dtype: torch.dtype) -> None:
    made = lowered(lambda x: x.cumsum(-1), torch.ones(1, 8).to(dtype))
    network = compile.interpret(load_stack(), made, compile.ours())
    output = network.interpreter.ctx.net.get_output(0)
    assert output.dtype == (load_stack().trt.float32 if dtype.is_floating_point else load_stack().trt.int64)
    assert build(network) is not None


def test_a_logarithm_of_one_more_is_taken_at_a_dynamic_length() -> None:
    made = lowered(lambda x: x.log1p(), torch.rand(1, 8))
    assert any(node.target is missing.LOG1P for node in made.graph.graph.nodes)
    assert build(compile.interpret(load_stack(), made, compile.ours())) is not None


def test_elements_are_gathered_at_a_dynamic_length() -> None:
    made = lowered(lambda x, i: x.gather(1, i), torch.randn(1, 8), torch.zeros(1, 8, dtype=torch.int64))
    assert any(node.target is missing.GATHER for node in made.graph.graph.nodes)
    assert build(compile.interpret(load_stack(), made, compile.ours())) is not None


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.slice_scatter(x[..., :3] * 2, -1, 0, 3),
        lambda x: x.slice_scatter(x[..., :3] * 2, -1, 2, 5),
        lambda x: x.slice_scatter(x[..., :3] * 2, -1, -3),
        lambda x: x.slice_scatter(x * 2, -1),
        lambda x: x.slice_scatter(x[..., ::2] * 2, -1, 0, 8, 2),
        lambda x: x.scatter(-1, x[:1, :1].argsort(-1)[..., :2], 7),
        lambda x: x.view(2, -1, 4).expand(2, -1, 4).reshape(-1, 4),
        lambda x: torch.bitwise_xor(torch.bitwise_or(torch.bitwise_and(x > 0, ~(x > 1)), x < -1), x > 2),
        lambda x: x.max(-1).values + x.max(-1).indices,
        lambda x: (x * 3).long().floor() + (x * 3).floor(),
        lambda x: (x * 9).long() / 4 + (x * 9).long() / torch.tensor(7),
        lambda x: torch.cat(x.max(1, keepdim=True), -1),
        lambda x: x.index_put((x > 0,), torch.tensor(7.0)),
        lambda x: x.index_put((x[..., 0] > 0,), x[0, :1] + 1),
        lambda x: (x @ x.transpose(1, 2))[:, -2:],
        lambda x: torch.ops.prims.broadcast_in_dim(x.sum(1), [3, 2, 8, 1], [1, 2]),
    ],
    ids=[
        "begin",
        "middle",
        "end",
        "whole",
        "every other",
        "number",
        "views",
        "bools",
        "largest",
        "rounded",
        "quotients",
        "largest, kept",
        "places",
        "rows",
        "last rows",
        "axes put in",
    ],
)
def test_the_form_that_converters_need_computes_the_same(write: Any) -> None:
    x = torch.randn(2, 3, 8)
    graph = program_of(write, x, dynamic=({1: length(2, 12)},)).module()
    expected = graph(x)

    network_form.prepare(graph)
    graph.graph.lint()

    assert torch.equal(graph(x), expected)


def test_what_is_written_at_the_places_of_a_mask_is_chosen() -> None:
    def write(x: Tensor) -> Tensor:
        x = x.clone()
        x[x == 2] = 0
        return x.index_put((x[:, 0] > 0,), x[0])

    made = lowered(write, torch.randint(4, (1, 8)))
    network_form.prepare(made.graph)
    used = {node.target for node in made.graph.graph.nodes}
    assert torch.ops.aten.where.self in used and torch.ops.aten.index_put.default not in used
    assert build(compile.interpret(load_stack(), made, compile.ours())) is not None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x.transpose(0, 1) <= x)[-1:].float(),  # a mask's last row: Gemma 4's layers that share keys
        lambda x: (x + x.transpose(0, 1)).std(-1, keepdim=True, unbiased=False),  # Gemma 3n's sparse MLP
    ],
    ids=["last row", "kept axis"],
)
def test_what_converters_miss_where_two_lengths_are_open_is_built(function: Any) -> None:
    made = compile.interpret(load_stack(), lowered(function, torch.rand(1, 8)), compile.ours())
    assert build(made) is not None


def test_what_is_written_place_by_place_or_added_stays_as_it_is() -> None:
    def write(x: Tensor) -> Tensor:
        made = x.index_put((x[:, 0, 0].long(),), torch.tensor(7.0))
        return made.index_put((x > 0,), torch.tensor(1.0), accumulate=True).index_put((x > 0,), x.flatten())

    graph = program_of(write, torch.ones(2, 3, 8)).module()
    network_form.prepare(graph)
    assert [node.target for node in graph.graph.nodes].count(torch.ops.aten.index_put.default) == 3


def test_bools_have_logical_operations_and_whole_numbers_keep_theirs() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        whole = x.long()
        return torch.bitwise_and(x > 0, x < 1), torch.bitwise_and(whole, whole + 1)

    graph = program_of(both, torch.randn(2, 3, 8)).module()
    network_form.prepare(graph)
    used = [node.target for node in graph.graph.nodes if "_and" in str(node.target)]
    assert sorted(map(str, used)) == ["aten.bitwise_and.Tensor", "aten.logical_and.default"]


def test_known_sizes_take_the_place_of_open_ones() -> None:
    graph = program_of(lambda x: x.view(2, -1, 2, 4).reshape(2, x.shape[1], -1), torch.randn(2, 3, 8)).module()
    network_form.prepare(graph)
    asked = [node.args[1] for node in graph.graph.nodes if node.target in network_form.VIEWS]
    assert asked and not any(size == -1 for sizes in asked for size in sizes)


@pytest.mark.parametrize(("scores", "values"), [(16, 8), (8, 16)], ids=["smaller values", "larger values"])
def test_values_of_another_head_size_take_the_native_layer(scores: int, values: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q[..., :scores], k[..., :scores], v[..., :values], is_causal=True)

    made = network(small(attend), "detect_causal", "error")
    (layer,) = layers(made, "ATTENTION_INPUT")
    assert [layer.get_input(i).shape[3] for i in range(3)] == [16, 16, 16]
    assert made.interpreter.ctx.net.get_output(0).shape[-1] == values
    assert build(made) is not None


@pytest.mark.skipif(
    load_stack().flavour != "tensorrt_rtx", reason="it is TensorRT-RTX that has no kernels of the layer"
)
def test_tensorrt_has_its_layer_of_experts_for_no_gpu_that_it_builds_for() -> None:
    """The day it has, :mod:`pipeline.model.experts` has something to measure itself against."""
    trt = load_stack().trt
    targets = [getattr(trt.ComputeCapability, name) for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    assert len(targets) > 3
    for target in targets:
        builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
        net, config = builder.create_network(0), builder.create_builder_config()
        hidden, chosen, scores = (
            net.add_input(name, dtype, (1, 64, size))
            for name, dtype, size in (("x", trt.float16, 128), ("i", trt.int32, 2), ("s", trt.float16, 2))
        )
        weights = [
            torch.randn(4, *sizes, dtype=torch.float16).numpy() for sizes in ((128, 256), (128, 256), (256, 128))
        ]
        layer = net.add_moe(hidden, chosen, scores)
        constants = (net.add_constant(each.shape, trt.Weights(each)).get_output(0) for each in weights)
        layer.set_gated_weights(*constants, trt.MoEActType.SILU)
        net.mark_output(layer.get_output(0))
        config.num_compute_capabilities = 1
        config.set_compute_capability(target, 0)
        assert builder.build_serialized_network(net, config) is None, target


# What a config says of more than text


def of_family(name: str) -> ModelConfig:
    return ModelConfig(name, weights="random", inputs=["input_ids"], architecture=families.described(name))


def test_a_decoder_of_text_alone_is_built_of_the_part_of_a_config_that_is_about_text() -> None:
    made = load.load(of_family("emu3"), "fp32", CPU, 0, lambda _: None).model
    assert made.config.model_type == "emu3_text_model"
    assert made(input_ids=torch.arange(3)[None]).logits.shape == (1, 3, families.SIZES["vocab_size"])


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="the package is here")
def test_a_package_that_transformers_needs_for_a_model_is_named() -> None:
    with pytest.raises(UserError, match=r"Gemma3nForConditionalGeneration \(.*timm.*\); install it$"):
        load.load(of_family("gemma3n"), "fp32", CPU, 0, lambda _: None)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "dbrx",
            r"^DbrxForCausalLM does what the numbers in a tensor decide \(for expert_idx in expert_hit:\), and no ",
        ),
        ("rwkv", "^RwkvForCausalLM is another program at another length: a loop over tokens, "),
    ],
)
def test_what_cannot_be_traced_says_what_of_the_models_code_is_in_the_way(name: str, why: str) -> None:
    config, shape = of_family(name), ShapeConfig("dynamic", 1, 2, 16, 32)
    form = CallForm(load.load(config, "fp32", CPU, 0, lambda _: None).model, "last")
    with pytest.raises(RunError, match=why):
        trace(form, config, shape, CPU)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("reformer", r"^ReformerModelWithLMHead does not run on tokens alone \(mixed dtype.*\); set another precision"),
        ("rwkv", "^cache=in_engine: RwkvForCausalLM keeps no keys and values; set cache=none$"),
    ],
)
def test_a_cache_is_not_blamed_for_what_a_model_does_without_one(name: str, why: str) -> None:
    made = load.load(of_family(name), "fp16", CPU, 0, lambda _: None).model
    with pytest.raises(UserError, match=why):
        programs.cache_of(made, CacheConfig("in_engine"), ShapeConfig("dynamic", 1, 2, 16, 32), None)


@pytest.mark.parametrize(("name", "longest"), [("xlnet", None), ("gemma4", 64), ("gpt2", 64)])
def test_a_model_may_have_positions_without_end(name: str, longest: int | None) -> None:
    assert positions_of(AutoConfig.for_model(**families.described(name))) == longest


# What is refused


def test_a_cache_says_that_it_is_full_to_a_model_that_makes_a_bias_as_long_as_it() -> None:
    config, made = settings("falcon", "in_engine"), loaded("falcon")
    cache = cache_of(config, made)
    assert cache is not None
    form = cached_forms.DecodeForm(made.model, cache)
    assert not form.says_full
    step = cached_forms.trace_decode(form, cache, CPU).program.module()
    assert form.says_full
    ids, (keys, values) = torch.tensor([[5, 7, 9]]), (cache.tensors(CPU)[:1], cache.tensors(CPU)[1:])
    for place in range(3):
        given = {"input_ids": ids[:, place : place + 1], "position": torch.tensor([place])}
        logits, key, value = step(**given, keys=keys, values=values)
        keys, values = [key], [value]
    torch.testing.assert_close(logits, made.model(ids).logits[:, -1:], rtol=1e-4, atol=1e-5)


class Model(torch.nn.Module):
    """A function of [batch, length] tokens where the stages want a model."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.model = loaded("mixtral").model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.function(input_ids)


def only_asserted(x: Tensor) -> Tensor:
    torch._check(x.sum().item() >= 0)
    return x * 2


def test_a_number_that_only_an_assertion_reads_is_no_obstacle() -> None:
    ids = {"input_ids": torch.ones(1, 5, dtype=torch.int64)}
    assert exported(Model(only_asserted), ids, None) is not None
    with pytest.raises(RunError, match=r"reads a number out of a tensor .*; backend=torch_compile") as error:
        exported(Model(lambda x: x * x.sum().item()), ids, None)
    assert error.value.kind == "export" and "\n" not in str(error.value)


def test_an_operation_without_a_layer_is_named_with_what_helps() -> None:
    made = lowered(lambda x: torch.linalg.svd(x.float()[..., None] * x.float()[:, None])[1], torch.randn(1, 8))
    with pytest.raises(
        RunError, match=r"TensorRT has no layer for aten\.\S+svd\.default \(.*\); backend=torch_compile"
    ) as error:
        compile.interpret(load_stack(), made, compile.ours())
    assert error.value.kind == "unsupported_op"


def test_what_cannot_be_lowered_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("Found no driver\nand more")

    monkeypatch.setattr("torch_tensorrt.dynamo.lowering.post_lowering", refuse)
    with pytest.raises(RunError, match=r"cannot lower it \(RuntimeError: Found no driver\); backend=") as error:
        lowered(lambda x: x * 2, torch.randn(1, 8))
    assert error.value.kind == "lowering"


# The config's file


def folder(path: Path, **changes: Any) -> Path:
    save_tiny_llama(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def from_folder(path: Path) -> load.LoadedModel:
    return load.load(ModelConfig("tiny", path=str(path)), "fp32", CPU, 0, lambda _: None)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_float_that_json_has_no_word_for_is_read_as_transformers_writes_it(value: float, tmp_path: Path) -> None:
    LlamaConfig(**TINY_LLAMA, some_limit=value).save_pretrained(tmp_path / "written")
    written = json.loads((tmp_path / "written" / "config.json").read_text())["some_limit"]
    assert set(written) == {"__float__"}

    path = folder(tmp_path / "model", some_limit=written, nested=[{"deep": written}], kept={"__float__": "other"})

    config, reference = from_folder(path).model.config, AutoConfig.from_pretrained(path)
    for read in (config, reference):
        assert repr([read.some_limit, read.nested, read.kept]) == repr(
            [value, [{"deep": value}], {"__float__": "other"}]
        )


AUTO_MAP = {"AutoConfig": "own.MyConfig", "AutoModelForCausalLM": "own.MyModel"}


def with_code(path: Path, **changes: Any) -> Path:
    folder(path, auto_map=AUTO_MAP, **changes)
    (path / "own.py").write_text(f"open({str(path / 'ran')!r}, 'w')\nclass MyConfig: ...\nclass MyModel: ...\n")
    return path


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_code_of_a_folder_is_not_run_and_the_report_and_console_say_so(
    weights: str, store: str, tmp_path: Path
) -> None:
    path, console = with_code(tmp_path / "model"), io.StringIO()
    display = StageDisplay(Console(file=console, width=300))

    outcome = do(
        store, tmp_path / "out", path, "until=load", "shape.max=32", f"model.weights={weights}", display=display
    )

    (note,) = (note for note in outcome.report["notes"] if "own.MyConfig" in note)
    assert "was not run" in note and note in console.getvalue()
    assert not (path / "ran").exists()


@pytest.mark.parametrize("changes", [{"model_type": "mine"}, {"architectures": ["MyModel"]}])
def test_a_model_that_needs_its_own_code_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = with_code(tmp_path / "model", **changes)
    with pytest.raises(UserError, match=r"needs code that comes with the model, .* choose a model that transformers"):
        from_folder(path)
    assert not (path / "ran").exists()
