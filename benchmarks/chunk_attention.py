"""Attention of a chunk of a prompt over what it sees of a KV cache: by its form and length, beside the whole prompt's.

``python -m benchmarks.chunk_attention > chunk_attention.jsonl`` builds each form as a layer by itself, checks its last
queries against PyTorch in fp32 and prints what it ran on, then one JSON row a case: microseconds, relative error.

``lower_right`` cuts keys and values out of the cache, as long as they are at run time, and sees by the layer's flag;
``mask`` does the same with a bool mask that is made in the network; ``band`` attends to the whole cache with such a
mask.  Values lie in the cache with the keys' axis last, and are turned.  ``whole`` is a prompt of so many tokens in one
pass.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.nn.attention.bias import causal_lower_right

from benchmarks.kernel_forms import HEADS, Net
from benchmarks.prompt_attention import median_us
from passes.tensorrt.fused_kernels import causal_kinds
from passes.tensorrt.versions import load_stack
from pipeline.record.environment import environment

MODELS = ("llama3_1b", "qwen3_0_6b")
FORMS = ("lower_right", "mask", "band")
CHUNKS = (512, 1024, 2048, 4096, 8192)
LONGEST = 32768
CHECKED = 256
"""Queries that are compared with PyTorch, the last ones."""


def build(model: str, form: str, chunk: int, capacity: int) -> bytes:
    """q [1, heads, chunk, size], k [1, kv heads, capacity, size], v [1, kv heads * size, capacity, 1] and places [1, S]
    -> out; of ``whole`` q, k and v [1, heads, tokens, size], whose number is open."""
    heads, kv_heads, size = HEADS[model]
    net = Net()
    kinds, softmax = causal_kinds(net.trt), net.trt.AttentionNormalizationOp.SOFTMAX
    if form == "whole":
        counts = {"q": heads, "k": kv_heads, "v": kv_heads}
        tensors = [net.input(name, (1, count, -1, size)) for name, count in counts.items()]
        layer = net.net.add_attention_v2(*tensors, softmax, kinds["upper_left"])
        open_sizes: list[tuple[str, list[tuple[int, ...]]]] = [
            (name, [(1, count, tokens, size) for tokens in (128, capacity, capacity)]) for name, count in counts.items()
        ]
        return _finished(net, layer, open_sizes)
    query, key = net.input("q", (1, heads, chunk, size)), net.input("k", (1, kv_heads, capacity, size))
    value, places = net.input("v", (1, kv_heads * size, capacity, 1)), net.input("places", (1, -1), "int")
    length = net.net.add_slice(net.net.add_shape(places).get_output(0), (1,), (1,), (1,)).get_output(0)

    def seen(x: Any) -> Any:
        if form == "band":
            return x
        layer = net.net.add_slice(x, (0,) * 4, (1,) * 4, (1,) * 4)
        outer, inner = (net.const(np.array(part, np.int64)) for part in (tuple(x.shape)[:2], tuple(x.shape)[3:]))
        layer.set_input(2, net.cat([outer, length, inner], 0))
        return layer.get_output(0)

    turned = net.net.add_shuffle(seen(value))
    turned.reshape_dims, turned.second_transpose = (1, kv_heads, size, -1), (0, 1, 3, 2)
    causal = "lower_right" if form == "lower_right" else "none"
    layer = net.net.add_attention_v2(query, seen(key), turned.get_output(0), softmax, kinds[causal])
    if causal == "none":
        keys = net.const(np.arange(capacity, dtype=np.int64).reshape(1, 1, 1, -1))
        if form == "mask":
            cut = net.net.add_slice(keys, (0,) * 4, (1,) * 4, (1,) * 4)
            cut.set_input(2, net.cat([net.const(np.ones(3, np.int64)), length], 0))
            keys = cut.get_output(0)
        rows = net.const(np.arange(1 - chunk, 1, dtype=np.int64).reshape(1, 1, -1, 1))
        last = net.binary(net.reshape(length, (1, 1, 1, 1)), rows)  # the first place that a row does not see
        layer.mask = net.binary(keys, last, "LESS")
    return _finished(net, layer, [("places", [(1, tokens) for tokens in (chunk, capacity, capacity)])])


def _finished(net: Net, layer: Any, open_sizes: list[tuple[str, list[tuple[int, ...]]]]) -> bytes:
    layer.decomposable = False
    net.output(layer.get_output(0), "out")
    return net.build(open_sizes)


def row_of(model: str, form: str, chunk: int, past: int, capacity: int) -> dict[str, Any]:
    """``chunk`` queries behind ``past`` places of a cache; of ``whole`` all of ``past + chunk`` tokens."""
    heads, kv_heads, size = HEADS[model]
    stack, stream, total = load_stack(), torch.cuda.Stream(), past + chunk
    data = build(model, form, chunk, capacity)
    engine = stack.trt.Runtime(stack.torch_tensorrt.logging.TRT_LOGGER).deserialize_cuda_engine(data)
    context = engine.create_execution_context()
    torch.manual_seed(0)
    length = total if form == "whole" else chunk
    q = torch.randn(1, heads, length, size, device="cuda").mul(size**-0.5).half()
    k, v = (torch.randn(1, kv_heads, capacity, size, device="cuda", dtype=torch.float16) for _ in "kv")
    held = {"q": q, "k": k, "v": v.transpose(2, 3).reshape(1, kv_heads * size, capacity, 1).contiguous()}
    held["places"] = torch.arange(total, device="cuda", dtype=torch.int32).unsqueeze(0)
    k, v = k[:, :, :total].contiguous(), v[:, :, :total].contiguous()
    if form == "whole":
        held = {"q": q, "k": k, "v": v}
    held["out"] = torch.full_like(q, float("nan"))
    for name, tensor in held.items():
        if name != "out" and not context.set_input_shape(name, tuple(tensor.shape)):
            raise ValueError(f"{name} {tuple(tensor.shape)}: outside the profile")
        context.set_tensor_address(name, tensor.data_ptr())
    torch.cuda.synchronize()

    def launch() -> None:
        context.execute_async_v3(stream.cuda_stream)

    with torch.cuda.stream(stream):
        us = median_us(launch)
    got, wanted = held["out"][:, :, -CHECKED:].float(), last_rows(q, k, v)
    error = float((got - wanted).norm() / wanted.norm())
    return {"model": model, "form": form, "chunk": chunk, "past": past, "us": us, "relative_error": error}


def last_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What the last :data:`CHECKED` of the queries q [1, heads, L, size], which are the last of the keys too, get in
    fp32; a head at a time."""
    group, last = q.shape[1] // k.shape[1], q[0, :, -CHECKED:].float()
    late = torch.ones(last.shape[1], k.shape[2], dtype=torch.bool, device=q.device).triu(k.shape[2] - last.shape[1] + 1)
    heads = [
        (each @ k[0, i // group].float().T).masked_fill(late, -torch.inf).softmax(-1) @ v[0, i // group].float()
        for i, each in enumerate(last)
    ]
    return torch.stack(heads).unsqueeze(0)


def pytorch_row(model: str, chunk: int, past: int) -> dict[str, Any]:
    heads, _, size = HEADS[model]
    q = torch.randn(1, heads, chunk, size, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(1, heads, past + chunk, size, device="cuda", dtype=torch.float16) for _ in "kv")
    mask = causal_lower_right(chunk, past + chunk)
    us = median_us(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, mask))
    return {"model": model, "form": "PyTorch", "chunk": chunk, "past": past, "us": us}


def rows() -> Iterator[dict[str, Any]]:
    for model in MODELS:
        yield row_of(model, "whole", LONGEST, 0, LONGEST)
        for chunk in CHUNKS:
            for past in (0, LONGEST - chunk):
                yield from (row_of(model, form, chunk, past, LONGEST) for form in FORMS)
                yield pytorch_row(model, chunk, past)


def main() -> int:
    print(json.dumps({"environment": asdict(environment(load_stack().versions()))}), flush=True)
    for row in rows():
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
