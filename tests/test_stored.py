"""Checkpoints that come quantised: each format, packed here bit by bit, stands for exactly the weights that it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_LLAMA, save_tiny_llama
from loading import CPU, local, nothing, refusal
from runs import DONE, SMALL, do
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from passes.errors import UserError
from passes.quantised import DEQUANTISED
from pipeline.config.quantize import QuantizeConfig
from pipeline.config.schema import ShapeConfig
from pipeline.engine import programs
from pipeline.model import quantise
from pipeline.model.load import LoadedModel, load, load_reference

Parts = dict[str, Tensor]
Packed = tuple[Parts, Tensor]
"""What a layer is stored as, and the weight in float64 that it stands for."""
GROUP = 32
HALF = torch.float16
SHAPE = ShapeConfig("dynamic", 1, 2, 16, 16)


def words(numbers: Tensor, bits: int) -> Tensor:
    """int32 [rows, n]: each row of ``numbers`` as one long whole number, the first in its lowest bits."""
    made = []
    for row in numbers.tolist():
        whole = sum(int(number) << (bits * place) for place, number in enumerate(row))
        size = -(-len(row) * bits // 32)
        made.append([int.from_bytes(whole.to_bytes(4 * size, "little")[4 * i : 4 * i + 4], "little", signed=True)
                     for i in range(size)])  # fmt: skip
    return torch.tensor(made, dtype=torch.int32)


def whole(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape)


def scales(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return (torch.rand(shape) * 0.01 + 0.001).to(dtype)


def spread(grouped: Tensor, inner: int) -> Tensor:
    """[out, groups] over the inputs [out, inner]."""
    return grouped.double().repeat_interleave(inner // grouped.shape[1], 1)


def gptq(
    bits: int, version: str = "gptq", act_order: bool = False, symmetric: bool = False
) -> Callable[[int, int], Packed]:
    def layer(out: int, inner: int) -> Packed:
        groups, most = inner // GROUP, 2**bits
        values, zeros, scale = whole(0, most, out, inner), whole(1, most, out, groups), scales(out, groups)
        zeros = torch.full_like(zeros, most // 2) if symmetric else zeros
        order = torch.randperm(inner) // GROUP if act_order else torch.arange(inner) // GROUP
        weight = (values - zeros[:, order]).double() * scale.double()[:, order]
        less = 1 if version == "gptq" else 0
        parts = {"qweight": words(values, bits).T, "qzeros": words(zeros.T - less, bits), "scales": scale.T}
        return {**parts, **({"g_idx": order.int()} if act_order or bits == 3 else {})}, weight

    return layer


def awq(out: int, inner: int) -> Packed:
    groups = inner // GROUP
    values, zeros, scale = whole(0, 16, out, inner), whole(0, 16, out, groups), scales(out, groups)

    def packed(numbers: Tensor) -> Tensor:  # [out, n] -> [n, out / 8]
        eights = numbers.T.unflatten(1, (-1, 8))
        return torch.cat([words(eights[:, i, [0, 2, 4, 6, 1, 3, 5, 7]], 4) for i in range(out // 8)], 1)

    weight = (values - spread(zeros, inner)) * spread(scale, inner)
    return {"qweight": packed(values), "qzeros": packed(zeros), "scales": scale.T}, weight


def packed_ct(bits: int, symmetric: bool) -> Callable[[int, int], Packed]:
    def layer(out: int, inner: int) -> Packed:
        groups, least = inner // GROUP, -(2 ** (bits - 1))
        values, scale = whole(least, -least, out, inner), scales(out, groups, dtype=torch.bfloat16)
        parts = {"weight_packed": words(values - least, bits), "weight_scale": scale,
                 "weight_shape": torch.tensor([out, inner])}  # fmt: skip
        if symmetric:
            return parts, values * spread(scale, inner)
        zeros = whole(least, -least, out, groups)
        parts["weight_zero_point"] = words(zeros.T - least, bits).T
        return parts, (values - spread(zeros, inner)) * spread(scale, inner)

    return layer


def int8(scale: str) -> Callable[[int, int], Packed]:
    def layer(out: int, inner: int) -> Packed:
        values, of = whole(-128, 128, out, inner).to(torch.int8), scales(out, 1, dtype=torch.float32)
        factors = 2.0 ** whole(-2, 3, inner) if scale == "modelopt" else torch.ones(inner)
        parts = {"weight": values, "weight_scale": of[:, 0] if scale == "modelopt" else of}
        parts |= {"pre_quant_scale": factors.float(), "input_scale": torch.ones(1)} if scale == "modelopt" else {}
        return parts, values.double() * of.double() * factors.double()

    return layer


def e4m3(scale: str) -> Callable[[int, int], Packed]:
    def layer(out: int, inner: int) -> Packed:
        values = (torch.randn(out, inner) * 50).to(torch.float8_e4m3fn)
        if scale == "blocks":  # the last ones are cut off
            of = scales(-(-out // 48), -(-inner // 40), dtype=torch.float32)
            wide = of.double().repeat_interleave(48, 0)[:out].repeat_interleave(40, 1)[:, :inner]
            return {"weight": values, "weight_scale_inv": of}, values.double() * wide
        of = scales(*{"tensor": (), "one": (1,)}.get(scale, (out, 1)), dtype=torch.float32)
        rows = {} if scale == "dynamic" else {"input_scale": torch.full((), 0.25)}
        return {"weight": values, "weight_scale": of, **rows}, values.double() * of.double()

    return layer


def int4_bytes(out: int, inner: int) -> Packed:
    groups = inner // GROUP
    values, scale = whole(-8, 8, out, inner), scales(out, groups)
    low, high = (values[0::2] & 15), (values[1::2] & 15)
    parts = {"weight": (low + 16 * high).to(torch.uint8), "weight_scale": scale}
    return parts, values * spread(scale, inner)


def ct(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


FORMATS: dict[str, tuple[dict[str, Any], Callable[[int, int], Packed]]] = {
    "GPTQ int4": ({"quant_method": "gptq", "bits": 4, "group_size": GROUP}, gptq(4)),
    "GPTQ int4 symmetric": ({"quant_method": "gptq", "bits": 4, "sym": True}, gptq(4, symmetric=True)),
    "GPTQ int4 act order": ({"quant_method": "gptq", "bits": 4, "desc_act": True}, gptq(4, act_order=True)),
    "GPTQ int3": ({"quant_method": "gptq", "bits": 3}, gptq(3)),
    "GPTQ int8 v2": ({"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"}, gptq(8, "gptq_v2")),
    "AWQ int4": ({"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}, awq),
    "compressed-tensors int4": (
        ct("pack-quantized", num_bits=4, type="int", strategy="group", group_size=GROUP), packed_ct(4, True),
    ),
    "compressed-tensors int4 asymmetric": (
        ct("pack-quantized", num_bits=4, type="int", strategy="group", symmetric=False), packed_ct(4, False),
    ),
    "compressed-tensors int6": (ct("pack-quantized", num_bits=6, strategy="group"), packed_ct(6, True)),
    "compressed-tensors int8": (ct("int-quantized", num_bits=8, type="int", strategy="channel"), int8("channel")),
    "compressed-tensors fp8": (ct("float-quantized", num_bits=8, type="float", strategy="tensor"), e4m3("one")),
    "compressed-tensors fp8 channel": (
        ct("float-quantized", num_bits=8, type="float", strategy="channel"), e4m3("channel"),
    ),
    "compressed-tensors fp8 dynamic": (
        ct("float-quantized", num_bits=8, type="float", strategy="channel"), e4m3("dynamic"),
    ),
    "ModelOpt fp8": ({"quant_method": "modelopt", "quant_algo": "FP8"}, e4m3("tensor")),
    "ModelOpt int8": ({"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"}, int8("modelopt")),
    "ModelOpt int4": ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": GROUP}, int4_bytes),
    "fp8 in blocks": ({"quant_method": "fp8", "weight_block_size": [48, 40]}, e4m3("blocks")),
}  # fmt: skip


def quantised(folder: Path, name: str, model: PreTrainedModel | None = None) -> dict[str, Tensor]:
    """Make ``folder`` a tiny Llama, or ``model``, in that format, the head left as it is; the weights that it then
    stands for."""
    settings, pack = FORMATS[name]
    torch.manual_seed(0)
    if model is None:
        save_tiny_llama(folder, num_hidden_layers=1)
    else:
        model.save_pretrained(folder)
    plain = load_file(folder / "model.safetensors")
    stored, expected = {}, dict(plain)
    for weight, tensor in plain.items():
        if weight.endswith("proj.weight"):
            parts, meant = pack(*tensor.shape)
            stored |= {f"{weight.removesuffix('.weight')}.{part}": each.contiguous() for part, each in parts.items()}
            expected[weight] = meant.float()
        else:
            stored[weight] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"quantization_config": settings}))
    return expected


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_stands_for_exactly_the_weights_that_it_says(name: str, tmp_path: Path) -> None:
    expected = quantised(tmp_path, name)
    loaded = load(local(tmp_path), "fp32", CPU, 0, nothing)
    assert set(loaded.model.state_dict()) == set(expected)
    for weight, tensor in expected.items():
        assert torch.equal(loaded.model.state_dict()[weight], tensor), weight
    assert any(note.startswith(f"weights come as {' '.join(name.split()[:2])}") for note in loaded.notes)


def test_its_reference_has_the_same_weights_one_type_wider(tmp_path: Path) -> None:
    expected = quantised(tmp_path, "GPTQ int4")
    narrow, wide = load(local(tmp_path), "bf16", CPU, 0, nothing).model, load_reference(local(tmp_path), "bf16", CPU, 0)
    for weight, tensor in expected.items():
        assert torch.equal(wide.state_dict()[weight], tensor)
        assert torch.equal(narrow.state_dict()[weight], tensor.bfloat16())


def test_experts_that_come_quantised_one_by_one_are_put_together(tmp_path: Path) -> None:
    sizes = {key: TINY_LLAMA[key] for key in ("vocab_size", "hidden_size", "num_attention_heads", "head_dim")}
    config = Qwen3MoeConfig(
        **sizes, num_key_value_heads=2, num_hidden_layers=1, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    expected = quantised(tmp_path / "model", "GPTQ int4", Qwen3MoeForCausalLM(config))
    loaded = load(local(tmp_path / "model"), "fp32", CPU, 0, nothing)
    assert "weights come as GPTQ int4: 16 dequantised to fp32" in loaded.notes
    loaded.model.save_pretrained(tmp_path / "again")  # one by one again
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert set(again) == set(expected) and any("experts.3.up_proj" in name for name in again)
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_sharded_weights_and_the_file_of_modelopt_alone_are_read(tmp_path: Path) -> None:
    expected = quantised(tmp_path, "ModelOpt fp8")
    described = json.loads((tmp_path / "config.json").read_text())
    settings = described.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(described))
    file = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": settings["quant_algo"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(file))
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    index = {name: f"part-{place % 2}.safetensors" for place, name in enumerate(sorted(tensors))}
    for shard in set(index.values()):
        save_file({name: tensors[name] for name in tensors if index[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    model = load(local(tmp_path), "fp32", CPU, 0, nothing).model
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.items())


# What an engine holds as it came


def held(folder: Path, precision: str, **asked: Any) -> LoadedModel:
    return quantise.load(local(folder), precision, QuantizeConfig(**asked), CPU, 0, nothing)


@pytest.mark.parametrize(
    ("name", "precision", "kind", "block"),
    [
        ("GPTQ int4 symmetric", "int4_weights", "int4", GROUP),
        ("compressed-tensors int4", "int4_weights", "int4", GROUP),
        ("ModelOpt int4", "int4_weights", "int4", GROUP),
        ("compressed-tensors int8", "int8_weights", "int8", None),
        ("ModelOpt int8", "int8_weights", "int8", None),
        ("ModelOpt fp8", "fp8", "e4m3", None),
        ("compressed-tensors fp8 dynamic", "fp8", "e4m3", None),
    ],
)
def test_weights_that_an_engine_can_hold_stay_as_they_came(
    name: str, precision: str, kind: str, block: int | None, tmp_path: Path
) -> None:
    expected = quantised(tmp_path, name)
    loaded = held(tmp_path, precision, base="bf16")
    assert {layer.rpartition(".")[2] for layer in loaded.quantised} == {
        *(f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down"))
    }
    for layer, weight in loaded.quantised.items():
        meant = weight.dequantised(torch.float32) * (1 if weight.row_factors is None else weight.row_factors)
        assert (weight.kind, weight.block) == (kind, block)
        assert torch.allclose(meant, expected[f"{layer}.weight"], rtol=2**-8)  # scales are numbers of bf16
        assert (weight.row_scale is None) == (kind != "e4m3")
        if weight.row_scale is not None:  # the checkpoint's, or measured
            assert (weight.row_scale == 0.25) == (name == "ModelOpt fp8")
            assert any("measured on text" in note for note in loaded.notes) == (weight.row_scale != 0.25)
        assert (weight.row_factors is None) == (name != "ModelOpt int8")
    assert [note for note in loaded.notes if note.endswith("7 layers as they came, scales rounded to bf16")]


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("ModelOpt int8", "int8_weights"),  # with factors of the rows
        pytest.param("GPTQ int4 symmetric", "int4_weights", marks=pytest.mark.slow),
        pytest.param("ModelOpt fp8", "fp8", marks=pytest.mark.slow),
    ],
)
def test_a_graph_holds_them_as_they_came(name: str, precision: str, tmp_path: Path) -> None:
    quantised(tmp_path, name)
    loaded, tokens = held(tmp_path, precision, base="bf16"), torch.arange(8)[None]
    (form,) = programs.parts(loaded.model, local(tmp_path), SHAPE, None, loaded.quantised).values()
    program = form().program
    nodes = [node.target for node in program.graph.nodes]
    assert nodes.count(DEQUANTISED) == 7
    with torch.no_grad():
        graph, model = program.module()(input_ids=tokens), loaded.model(tokens, logits_to_keep=1).logits
    assert torch.equal(graph, model)


@pytest.mark.parametrize(
    ("name", "precision", "asked", "says"),
    [
        (
            "AWQ int4",
            "int4_weights",
            {},
            "comes as AWQ int4, which no engine holds as int4; set precision=fp16 or bf16",
        ),
        ("GPTQ int4 act order", "int4_weights", {}, "comes as GPTQ int4, which no engine holds as int4"),
        ("GPTQ int4 symmetric", "int8_weights", {}, "comes as GPTQ int4, which no engine holds as int8"),
        ("fp8 in blocks", "fp8", {}, "comes as fp8 in blocks, which no engine holds as e4m3"),
        ("ModelOpt int4", "int4_weights", {"method": "awq"}, "comes as ModelOpt int4; leave it out"),
    ],
)
def test_what_an_engine_cannot_hold_as_asked_is_one_line(
    name: str, precision: str, asked: dict[str, Any], says: str, tmp_path: Path
) -> None:
    quantised(tmp_path, name)
    with pytest.raises(UserError) as caught:
        held(tmp_path, precision, **asked)
    assert says in str(caught.value)


@pytest.mark.slow  # whole builds
@pytest.mark.parametrize("precision", ["int4_weights", "fp16"])
def test_a_checkpoint_that_comes_as_int4_becomes_an_engine_of_int4_where_that_is_asked_for(
    precision: str, store: str, tmp_path: Path
) -> None:
    quantised(tmp_path / "model", "GPTQ int4 symmetric")
    outcome = do(store, tmp_path / "out", tmp_path / "model", f"precision={precision}", *SMALL)
    assert outcome.report["status"] == DONE, outcome.report["failure"]
    small = precision == "int4_weights"
    products = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64  # of the layer; int4 is half a byte
    assert outcome.report["engine"]["weights"].get("int4") == (products // 2 if small else None)
    if small:
        assert "no unquantised ones" in outcome.report["quality"]["not_judged"]
    came = "7 layers as they came, scales rounded" if small else "7 dequantised"
    assert any(note == f"weights come as GPTQ int4: {came} to fp16" for note in outcome.report["notes"])


# What is refused


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "hqq"}, "quantised by hqq, and read are gptq, awq, compressed-tensors, modelopt, fp8"),
        ({"quant_method": "gptq", "bits": 5}, "quantised by gptq with bits=5, and read are 2, 3, 4, 8"),
        ({"quant_method": "gptq"}, "gptq with bits=None"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format=marlin"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down": {"bits": 8}}}, "dynamic gives layers"),
        ({"quant_method": "awq", "bits": 3}, "quantised by awq with bits=3, and read are 4"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version=gemv, and read are gemm"),
        (ct("pack-quantized", num_bits=9, strategy="group"), "num_bits=9, and read are 2, 3, 4, 5, 6, 7, 8"),
        (ct("nvfp4-pack-quantized", num_bits=4, strategy="group"), "format=nvfp4-pack-quantized"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "config_groups of which none"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo=NVFP4, and read are FP8, "),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "weight_block_size=[0, 128]"),
    ],
)
def test_a_format_that_is_not_read_is_one_line_before_weights_are(
    settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_LLAMA | {"quantization_config": settings}))
    message = refusal(local(tmp_path))
    assert message.startswith(f"model.path={tmp_path}: holds weights quantised by ") and says in message


def spoiled(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> str:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return refusal(local(folder))


@pytest.mark.parametrize(
    ("name", "part"),
    [("GPTQ int4", "scales"), ("compressed-tensors int8", "weight_scale"), ("fp8 in blocks", "weight_scale_inv")],
)
def test_scales_that_are_missing_or_no_numbers_are_named(name: str, part: str, tmp_path: Path) -> None:
    quantised(tmp_path, name)
    layer = "model.layers.0.mlp.up_proj"

    def not_a_number(tensors: dict[str, Tensor]) -> None:
        tensors[f"{layer}.{part}"].view(-1)[1] = float("nan")

    begins = f"model.path={tmp_path}: {layer}, stored as {name}: its "
    assert spoiled(tmp_path, not_a_number) == f"{begins}scales are not all finite"
    assert spoiled(tmp_path, lambda tensors: tensors.__delitem__(f"{layer}.{part}")) == f"{begins}{part} is missing"


def test_parts_that_do_not_fit_each_other_or_the_model_are_named(tmp_path: Path) -> None:
    quantised(tmp_path, "GPTQ int4")
    layer = "model.layers.0.mlp.up_proj"

    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[f"{layer}.qzeros"] = tensors[f"{layer}.qzeros"][:, :-1].contiguous()

    assert f"{layer}, stored as GPTQ int4: [2, 11] words" in spoiled(tmp_path, cut)
    quantised(tmp_path, "GPTQ int4")

    def shorter(tensors: dict[str, Tensor]) -> None:
        tensors[f"{layer}.qweight"] = tensors[f"{layer}.qweight"][:-4].contiguous()
        for part in ("scales", "qzeros"):
            tensors[f"{layer}.{part}"] = tensors[f"{layer}.{part}"][:1].contiguous()

    assert "weights do not fit its config (mismatched_keys: 1" in spoiled(tmp_path, shorter)
