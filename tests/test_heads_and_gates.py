"""What is done to the rows of a prompt changes no bit, and TensorRT makes the kernels of it that it is done for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.graph import driver
from passes.graph.rewrite import rewrite
from passes.tensorrt import gates
from passes.tensorrt.network_passes import PASSES
from passes.tensorrt.versions import load_stack
from pipeline.__main__ import compose_config
from pipeline.config.schema import BackendConfig
from pipeline.engine import network
from pipeline.engine.build import build_engine
from pipeline.run import run

aten = torch.ops.aten
BEFORE = tuple(each for each in PASSES if each.name in ("write_known_sizes", "write_squares"))
OWN = tuple(each for each in PASSES if each.name in ("read_heads_twice", "multiply_gates"))


def lowered(
    name: str, batch: int = 1, lengths: tuple[int, int] = (2, 64), precision: str = "fp16", **changes: Any
) -> Any:
    traced = tiny.traced(name, precision, ("input_ids",), batch, lengths, **changes)
    program = rewrite(traced.program, "detect_causal", "mask").program
    return network.lower(load_stack(), program, traced.inputs, BackendConfig("tensorrt"), precision)


def changed(graph: GraphModule) -> dict[str, int]:
    return {each.name: each.changed for each in driver.run(OWN, graph, lambda each: each)}


@pytest.mark.parametrize("lengths", [(2, 64), (32, 32)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("name", "heads", "gates"), [("llama", 0, 2), ("qwen3", 2, 1), ("gemma3", 2, 1), ("gpt2", 0, 0), ("phi3", 0, 1)]
)
def test_no_bit_changes(name: str, heads: int, gates: int, batch: int, lengths: tuple[int, int]) -> None:
    """``phi3``: gate and up are one product of the model's own, which a BLAS may add up in another order than two."""
    graph = lowered(name, batch, lengths).graph
    driver.run(BEFORE, graph, lambda each: each)
    for key, value in graph.state_dict().items():
        if "norm" in key:
            value.uniform_(0.5, 2)  # ones, in a new model
    inputs = {"input_ids": tiny.tokens(batch, 32)}
    with torch.no_grad():
        before = graph(**inputs)
        assert changed(graph) == {"read_heads_twice": heads, "multiply_gates": gates}
        graph.graph.lint()
        graph.recompile()
        after = graph(**inputs)
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))
    assert changed(graph) == {"read_heads_twice": 0, "multiply_gates": 0}  # done once


def test_of_one_token_heads_and_values_are_cut_out_of_the_product_and_no_bit_changes() -> None:
    graph, tokens = lowered("qwen3", lengths=(1, 1)).graph, tiny.tokens(1, 1)
    assert changed(graph) == {"read_heads_twice": 0, "multiply_gates": 0}  # three products, each read where it is
    driver.run(BEFORE, graph, lambda each: each)
    tiny.with_fused_rows(graph)
    graph.recompile()
    with torch.no_grad():
        before = graph(input_ids=tokens)
        assert changed(graph) == {"read_heads_twice": 1, "multiply_gates": 0}
        graph.graph.lint()
        graph.recompile()
        assert all(torch.equal(one, other) for one, other in zip(graph(input_ids=tokens), before, strict=True))
    (product,) = {node for node in graph.graph.nodes if node.target is aten.linear.default and len(node.users) > 2}
    cuts = [user for whole in product.users for user in whole.users if user.target is aten.slice.Tensor]
    assert sorted((each.args[1], *each.args[2:]) for each in cuts if each.args[1] == 2) == [(2, 0, 6), (2, 6, 8)]


def test_in_fp32_there_is_no_cast_to_hand_over() -> None:
    wide = lowered("qwen3", precision="fp32").graph
    driver.run(BEFORE, wide, lambda each: each)
    assert changed(wide)["read_heads_twice"] == 0


def gated(then: Callable[[Tensor, Tensor, Tensor], Tensor]) -> int:
    """How many products of ``then(gate, up, x)`` are taken by themselves, none of whose bits changes."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return then(self.gate(x), self.up(x), x)

    torch.manual_seed(0)
    rows = torch.randn(2, 5, 8)
    graph = torch.export.export(Layer(), (rows,)).module()
    before, found = graph(rows), gates.multiply_gates(graph)
    graph.graph.lint()
    graph.recompile()
    torch.testing.assert_close(graph(rows), before, rtol=1e-6, atol=1e-6)
    return found


def test_a_product_that_is_no_gates_partner_is_left_alone() -> None:
    silu = torch.nn.functional.silu
    assert gated(lambda gate, up, x: silu(gate) * up) == gated(lambda gate, up, x: up * silu(gate)) == 1
    assert gated(lambda gate, up, x: silu(gate) * up + up) == 0  # read twice
    assert gated(lambda gate, up, x: gate * up) == 0  # nothing is activated: which of them waits for the other?
    assert gated(lambda gate, up, x: x.mean(-1, keepdim=True) * up + gate) == 0
    assert gated(lambda gate, up, x: (silu(gate) + x[..., :1]) * up) == 0  # of something else as well


@pytest.mark.parametrize(("outputs", "first", "found"), [(32, 16, 1), (17, 16, 0)])
def test_one_product_for_both_is_taken_apart_where_it_is_in_two_equal_parts(
    outputs: int, first: int, found: int
) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = torch.nn.Linear(8, outputs)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.both(x).split(first, -1)
            return torch.nn.functional.silu(gate) * up

    torch.manual_seed(0)
    rows = torch.randn(2, 5, 8)
    graph = torch.export.export(Layer(), (rows,)).module()
    before = graph(rows)
    assert gates.multiply_gates(graph) == found
    graph.graph.lint()
    graph.recompile()
    torch.testing.assert_close(graph(rows), before, rtol=1e-6, atol=1e-6)


def sources(data: bytes) -> list[str]:
    """The signatures of the fused kernels whose source is in an engine, ``__myl_SiluMul(half, half, half)``, and the
    names of products with something behind."""
    found = []
    for kernel in re.finditer(rb"__global__ void (__myl_\w+?)_0x\w+\(([^)]*)\)", data):
        kinds = re.findall(r"(half|float|int\d*)\w*[^,]*\*", kernel[2].decode())
        found.append(f"{kernel[1].decode()}({', '.join(kinds)})")
    return found + [each.decode() for each in re.findall(rb"runtime_fusion=\{ name=(__myl_\w+)", data)]


def kernels(name: str, without: tuple[str, ...] = (), **changes: Any) -> list[str]:
    """:func:`sources` of the engine of one layer of ``name``."""
    stack, sizes = load_stack(), {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, **changes}
    low = lowered(name, lengths=(256, 256), **sizes)
    made = network.interpret(stack, low, network.ours(without=without))
    return sources(bytes(build_engine(stack, made, lambda *_: True).data))


def test_the_norm_of_a_head_hands_over_its_root_alone() -> None:
    taken, left = kernels("qwen3"), kernels("qwen3", ("read_heads_twice",))
    assert any(re.match(r"__myl_ReshCastMulMeanAddSqrt\(", each) and each.count("float") == 2 for each in taken), taken
    assert any(re.match(r"__myl_ReshCastMulMean\(half, float, float\)", each) for each in left), left
    assert not any(re.match(r"__myl_ReshCastMulMean\(half, float, float\)", each) for each in taken), taken


@pytest.mark.parametrize(("name", "activation"), [("llama", "Silu"), ("gemma3", "Tanh")])
def test_a_gate_is_multiplied_where_the_product_is_written(name: str, activation: str) -> None:
    taken, left = kernels(name), kernels(name, ("multiply_gates",))
    assert [each for each in taken if each.startswith("__myl_Fc") and activation in each], taken
    assert not [each for each in left if each.startswith("__myl_Fc") and activation in each], left


@pytest.mark.parametrize(("without", "updates"), [([], 1), (["read_heads_twice"], 2)])
def test_a_step_puts_keys_and_values_into_the_cache_in_one_kernel(
    without: list[str], updates: int, store: str, tmp_path: Path
) -> None:
    """``updates``: kernels of a layer in whose name is a scatter; those of the first layer have the angles in it."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
    asked = ["model=qwen3_0_6b", "model.weights=random", "model.logits=last", "cache=in_engine", "shape.max=256"]
    asked += [f"model.architecture.{key}={value}" for key, value in sizes.items()]
    asked += [f"strategy.without=[{','.join(without)}]", "until=build", "store.enabled=false"]
    asked += [f"tracking.uri={store}", f"output={tmp_path}"]
    outcome = run(compose_config(asked))
    assert outcome.report["failure"] is None
    data = (outcome.folder / "decode.trt").read_bytes()
    launched = re.findall(rb"function=\{ name=(__myl_\w*Scat\w*)", data)
    assert len(launched) in (updates * 2, updates * 2 + 1), launched
