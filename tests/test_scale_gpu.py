"""The softmax scale in front of a causal native layer, on the GPU: TensorRT-RTX 1.4 lost it in one form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from passes.tensorrt import attention
from passes.tensorrt.versions import load_stack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

HEADS, KEY_HEADS = 8, 2
LENGTHS = (2, 513, 2048)


def run_causal_layer(form: str, head_size: int, length: int) -> float:
    """Relative error of one causal layer built for 2..2048, with its scale applied in ``form``."""
    from torch_tensorrt.dynamo.conversion._ConversionContext import ConversionContext

    stack = load_stack()
    trt, scale = stack.trt, head_size**-0.5
    builder = trt.Builder(stack.torch_tensorrt.logging.TRT_LOGGER)
    settings = stack.torch_tensorrt.dynamo.CompilationSettings()
    ctx = ConversionContext(builder.create_network(0), settings)
    network, config = ctx.net, builder.create_builder_config()
    profile, tensors = builder.create_optimization_profile(), []
    for name, heads in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)):
        tensors.append(network.add_input(name, trt.float16, (1, heads, -1, head_size)))
        profile.set_shape(name, *[(1, heads, n, head_size) for n in (2, 2048, 2048)])
    config.add_optimization_profile(profile)
    query: Any = tensors[0]
    node: Any = SimpleNamespace(name="call")
    if form == "vector":
        query = attention.scaled(stack, ctx, query, scale, node)
    elif form == "scalar":
        factor = attention.as_tensor(ctx, torch.full((1, 1, 1, 1), scale).half(), "factor")
        query = network.add_elementwise(query, factor, trt.ElementWiseOperation.PROD).get_output(0)
    layer = attention.add_layer(stack, network, (query, *tensors[1:]), "upper_left")
    layer.decomposable = False
    layer.get_output(0).name = "out"
    network.mark_output(layer.get_output(0))
    engine = trt.Runtime(stack.torch_tensorrt.logging.TRT_LOGGER).deserialize_cuda_engine(
        builder.build_serialized_network(network, config)
    )
    context = engine.create_execution_context()

    generator = torch.Generator("cuda").manual_seed(length)
    q, k, v = (
        torch.randn(1, heads, length, head_size, device="cuda", generator=generator).half()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    if form == "in the query":
        q = q * scale
    out = torch.full_like(q, float("nan"))
    for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
        if name != "out":
            context.set_input_shape(name, tuple(tensor.shape))
        context.set_tensor_address(name, tensor.data_ptr())
    torch.cuda.synchronize()
    assert context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    truth = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), is_causal=True, scale=1.0 if form == "in the query" else scale, enable_gqa=True
    )
    return float((out.float() - truth).norm() / truth.norm())


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", ["scalar", "vector", "in the query"])
def test_the_scale_is_right_in_every_form(form: str, length: int, head_size: int) -> None:
    # fp16 keeps 11 bits; the output is a mean of values of size 1, the probabilities are rounded once more.
    assert run_causal_layer(form, head_size, length) < 4 * torch.finfo(torch.float16).eps
