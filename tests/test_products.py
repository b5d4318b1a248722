"""Weights of a prompt's products lie with what is summed over as their first axis, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch.fx import GraphModule

from passes.tensorrt.network_passes import PASSES
from passes.tensorrt.products import FEW, transpose_weights
from passes.tensorrt.versions import load_stack
from pipeline.config.schema import BackendConfig
from pipeline.engine import network

LINEAR = torch.ops.aten.linear.default


def lowered(name: str) -> network.Lowered:
    traced = tiny.traced(name)
    program = tiny.rewritten("detect_causal", "mask", name).program
    return network.lower(load_stack(), program, traced.inputs, BackendConfig("tensorrt"), "fp32")


@pytest.mark.parametrize("name", ["llama", "qwen2"])  # without biases, and with
def test_every_product_of_a_prompt_has_its_weights_turned_and_gives_the_same(name: str) -> None:
    graph = lowered(name).graph
    before = copy.deepcopy(graph)
    count = sum(node.target is LINEAR for node in graph.graph.nodes)

    assert transpose_weights(graph) == count > 5
    graph.recompile()

    assert not any(node.target is LINEAR for node in graph.graph.nodes)
    tokens = tiny.tokens(1, 9)
    wanted = before(input_ids=tokens)
    torch.testing.assert_close(graph(input_ids=tokens), wanted, rtol=1e-5, atol=1e-5)


def test_the_network_multiplies_with_weights_as_they_lie() -> None:
    stack, low = load_stack(), lowered("llama")
    made = network.interpret(stack, low, network.Conversion(PASSES[:2], network.ours().converters))

    net, kinds = made.interpreter.ctx.net, stack.trt.LayerType
    layers = [net.get_layer(i) for i in range(net.num_layers)]
    products = [layer for layer in layers if layer.type == kinds.MATRIX_MULTIPLY]
    for each in products:
        each.__class__ = stack.trt.IMatrixMultiplyLayer
    many = [each for each in products if tuple(each.get_output(0).shape)[-2] != 1 and each.op1 is not None]
    turned = [each for each in many if each.op1 == stack.trt.MatrixOperation.TRANSPOSE]
    assert len(many) > 5 and not turned


def of_rows(rows: int) -> GraphModule:
    layer = torch.nn.Linear(8, 4)
    program = torch.export.export(layer, (torch.zeros(rows, 1, 8),)).run_decompositions({})
    graph = program.module()
    assert isinstance(graph, GraphModule)
    return graph


def test_a_product_of_few_rows_is_left_alone() -> None:
    assert [transpose_weights(of_rows(rows)) for rows in (1, 4, FEW - 1, FEW)] == [0, 0, 0, 1]


def test_a_weight_that_is_computed_is_left_alone() -> None:
    class Computed(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, weight * 2)

    program = torch.export.export(Computed(), (torch.zeros(FEW, 8), torch.zeros(4, 8))).run_decompositions({})
    assert transpose_weights(program.module()) == 0
