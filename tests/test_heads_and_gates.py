"""What is done to the rows of a prompt changes no bit, and TensorRT makes the kernels of it that it is done for."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.graph import driver
from passes.graph.rewrite import rewrite
from passes.tensorrt import many_rows
from passes.tensorrt.network_passes import PASSES
from passes.tensorrt.versions import load_stack
from pipeline.config.schema import BackendConfig
from pipeline.engine import network
from pipeline.engine.build import build_engine

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


def test_one_token_and_fp32_stay_as_they_are() -> None:
    assert changed(lowered("qwen3", lengths=(1, 1)).graph) == {"read_heads_twice": 0, "multiply_gates": 0}
    wide = lowered("qwen3", precision="fp32").graph
    driver.run(BEFORE, wide, lambda each: each)
    assert changed(wide)["read_heads_twice"] == 0  # there is no cast


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
    before, found = graph(rows), many_rows.multiply_gates(graph)
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


def kernels(name: str, without: tuple[str, ...] = (), **changes: Any) -> list[str]:
    """The signatures of the fused kernels whose source is in the engine of one layer of ``name``, in the order of the
    source: ``__myl_SiluMul(half*, half*, half*)``."""
    stack, sizes = load_stack(), {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, **changes}
    low = lowered(name, lengths=(256, 256), **sizes)
    made = network.interpret(stack, low, network.ours(without=without))
    data = bytes(build_engine(stack, made, lambda *_: True).data)
    found = []
    for kernel in re.finditer(rb"__global__ void (__myl_\w+?)_0x\w+\(([^)]*)\)", data):
        kinds = re.findall(r"(half|float|int\d*)\w*[^,]*\*", kernel[2].decode())
        found.append(f"{kernel[1].decode()}({', '.join(kinds)})")
    products = re.findall(rb"runtime_fusion=\{ name=(__myl_\w+)", data)
    return found + [each.decode() for each in products]


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
