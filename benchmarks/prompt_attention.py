"""Causal attention over a whole prompt: the native layer in four forms, and PyTorch's kernels beside it.

``python -m benchmarks.prompt_attention > prompt_attention.jsonl`` builds a chain of layers for each form, checks it
against PyTorch in fp32 and prints what it ran on, then one JSON row a form: microseconds a layer, relative error,
kernels.

``causal`` hands grouped heads over as they are, ``repeated`` as many key-value heads as query heads, ``turned`` has the
heads behind the tokens in memory, as a projection leaves them, and ``full`` sees every key.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernel_forms import HEADS, Net
from benchmarks.kernels import kernel_times
from passes.tensorrt.versions import load_stack
from pipeline.record.environment import environment

MODELS = ("llama3_1b", "qwen2_5_0_5b", "qwen3_0_6b")
FORMS = ("causal", "causal.repeated", "causal.turned", "causal.repeated.turned", "full")
LENGTH = 2048
CHAIN = 4
ROUNDS = 30


def build(model: str, form: str) -> bytes:
    """q and k0, v0 ... [1, heads, tokens, size], or with heads and tokens turned -> out; each layer's query is q plus
    the result of the one before."""
    heads, kv_heads, size = HEADS[model]
    net, turned = Net(), "turned" in form

    def shape(count: int) -> tuple[int, ...]:
        return (1, LENGTH, count, size) if turned else (1, count, LENGTH, size)

    def turn(x: Any) -> Any:
        if not turned:
            return x
        layer = net.net.add_shuffle(x)
        layer.first_transpose = (0, 2, 1, 3)
        return layer.get_output(0)

    query = first = net.input("q", shape(heads))
    for i in range(CHAIN):
        k, v = (net.input(f"{name}{i}", shape(heads if "repeated" in form else kv_heads)) for name in "kv")
        softmax = net.trt.AttentionNormalizationOp.SOFTMAX
        layer = net.net.add_attention(turn(query), turn(k), turn(v), softmax, form.startswith("causal"))
        layer.decomposable = False
        query = net.binary(first, turn(layer.get_output(0)))
    net.output(query, "out")
    return net.build()


def inputs_of(model: str, form: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs by name as :func:`build` takes them, and what it should give in fp32 [1, heads, tokens, size]."""
    heads, kv_heads, size = HEADS[model]
    draw = torch.Generator().manual_seed(0)
    made = {"q": torch.randn(1, heads, LENGTH, size, generator=draw).mul(size**-0.5).half().cuda()}
    wanted = query = made["q"].float()
    for i in range(CHAIN):
        k, v = (torch.randn(1, kv_heads, LENGTH, size, generator=draw).half().cuda() for _ in "kv")
        out = torch.nn.functional.scaled_dot_product_attention(
            query, k.float(), v.float() / 4, is_causal=form.startswith("causal"), scale=1.0, enable_gqa=True
        )
        wanted = query = made["q"].float() + out
        if "repeated" in form:
            k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        made |= {f"k{i}": k, f"v{i}": v / 4}
    if "turned" in form:
        made = {name: tensor.transpose(1, 2).contiguous() for name, tensor in made.items()}
    return made, wanted


def row_of(model: str, form: str) -> dict[str, Any]:
    stack, stream = load_stack(), torch.cuda.Stream()
    engine = stack.trt.Runtime(stack.torch_tensorrt.logging.TRT_LOGGER).deserialize_cuda_engine(build(model, form))
    context = engine.create_execution_context()
    held, wanted = inputs_of(model, form)
    held["out"] = torch.full_like(held["q"], float("nan"))
    for name, tensor in held.items():
        context.set_tensor_address(name, tensor.data_ptr())
    torch.cuda.synchronize()

    def launch() -> None:
        context.execute_async_v3(stream.cuda_stream)

    launch()
    stream.synchronize()
    got = held["out"].float()
    got = got.transpose(1, 2) if "turned" in form else got
    with torch.cuda.stream(stream):
        us = median_us(launch) / CHAIN
    error = float((got - wanted).norm() / wanted.norm())
    return {"model": model, "form": form, "us": us, "relative_error": error, "kernels": kernel_times(launch)[:5]}


def pytorch_row(model: str, backend: SDPBackend) -> dict[str, Any]:
    heads, _, size = HEADS[model]
    q, k, v = (torch.randn(1, heads, LENGTH, size, device="cuda", dtype=torch.float16) for _ in "qkv")
    with sdpa_kernel(backend):
        us = median_us(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    return {"model": model, "form": f"PyTorch, {backend.name}", "us": us}


def median_us(launch: Any) -> float:
    """Median time of ``launch`` in microseconds, on the current stream."""
    times = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return float(np.median(times))


def main() -> int:
    print(json.dumps({"environment": asdict(environment(load_stack().versions()))}), flush=True)
    for model in MODELS:
        for form in FORMS:
            print(json.dumps(row_of(model, form)), flush=True)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            print(json.dumps(pytorch_row(model, backend)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
