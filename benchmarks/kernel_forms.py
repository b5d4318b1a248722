"""The cases of the kernel map: every form of an attention or a linear layer, as a network of its own.

A form is a network, its inputs, and what it should give in fp32; :mod:`benchmarks.kernels` builds and runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from passes.tensorrt.versions import load_stack

HEADS = {"llama3_1b": (32, 8, 64), "qwen2_5_0_5b": (14, 2, 64), "qwen3_0_6b": (16, 8, 128), "smollm2_135m": (9, 3, 64)}
SIZES = {  # hidden, q+k+v, attention output, intermediate, vocabulary
    "llama3_1b": (2048, 3072, 2048, 8192, 128256),
    "qwen2_5_0_5b": (896, 1152, 896, 4864, 151936),
    "qwen3_0_6b": (1024, 4096, 2048, 3072, 151936),
}
KEYS = (512, 1024, 2048, 2176, 3072, 4096, 8192)
ATTENTION = ("native", "native_mask", "native_folded", "rows", "rows_mask", "rows_bias", "matmul", "chunks16")
LINEAR = ("nt", "nn", "rows8", "reduce", "nt_int8", "rows8_int8", "rows8_int4", "reduce_int8", "reduce_int4")
CHAIN = 8
Shape = tuple[int, ...]
BLOCK = 128
"""Inputs that share a scale of int4 weights."""
FOLDED = 8
"""Channels that hold the mask: head sizes with fused kernels are multiples of 8."""
BLOCKED = -30000.0
UNSEEN = 37
"""Keys at the end of the cache that must not be seen, where the form can hide them."""


class Net:
    """A strongly typed network with the few layers that the cases need; all tensors are fp16."""

    def __init__(self) -> None:
        stack = load_stack()
        self.trt = stack.trt
        self.builder = self.trt.Builder(stack.torch_tensorrt.logging.TRT_LOGGER)
        self.net = self.builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.kept: list[Any] = []

    def input(self, name: str, shape: tuple[int, ...], kind: str = "half") -> Any:
        return self.net.add_input(
            name, {"half": self.trt.float16, "bool": self.trt.bool, "int": self.trt.int32}[kind], shape
        )

    def const(self, value: np.ndarray) -> Any:
        value = np.ascontiguousarray(value)
        self.kept.append(value)
        return self.net.add_constant(value.shape, self.trt.Weights(value)).get_output(0)

    def weight(self, value: np.ndarray, bits: int = 16, wide: bool = False) -> Any:
        """``value`` [out, in] as fp16: itself, or dequantised from int8 with a scale an output (one, if alike) or
        from int4 with a scale for each :data:`BLOCK` inputs of an output.  ``wide``: as fp32."""
        kind, scale_type = (self.trt.float32, np.float32) if wide else (self.trt.float16, np.float16)
        if bits == 16:
            held = self.const(value)
            return self.net.add_cast(held, kind).get_output(0) if wide else held
        out, inner = value.shape
        most = 2 ** (bits - 1) - 1
        blocks = value.astype(np.float32).reshape(out, -1, BLOCK if bits == 4 and inner % BLOCK == 0 else inner)
        scales = (np.abs(blocks).max(2, keepdims=True) / most).astype(scale_type)
        whole = np.clip(np.rint(blocks / scales.astype(np.float32)), -most, most).astype(np.int8).reshape(out, inner)
        if bits == 8:
            alike = bool((scales == scales.flat[0]).all())
            scale = self.const(scales.reshape(out)[0] if alike else scales.reshape(out))
            layer = self.net.add_dequantize(self.const(whole), scale, kind)
            if not alike:
                layer.axis = 0
            return layer.get_output(0)
        packed = np.ascontiguousarray((whole[:, ::2] & 15) | (whole[:, 1::2] << 4))
        self.kept.append(packed)
        four = self.net.add_constant((out, inner), self.trt.Weights(self.trt.int4, packed.ctypes.data, whole.size))
        scales = self.const(scales.reshape(out, -1))
        return self.net.add_dequantize(four.get_output(0), scales, kind).get_output(0)

    def matmul(self, a: Any, b: Any, ta: bool = False, tb: bool = False) -> Any:
        op = {False: self.trt.MatrixOperation.NONE, True: self.trt.MatrixOperation.TRANSPOSE}
        return self.net.add_matrix_multiply(a, op[ta], b, op[tb]).get_output(0)

    def binary(self, a: Any, b: Any, op: str = "SUM") -> Any:
        return self.net.add_elementwise(a, b, getattr(self.trt.ElementWiseOperation, op)).get_output(0)

    def unary(self, x: Any, op: str) -> Any:
        return self.net.add_unary(x, getattr(self.trt.UnaryOperation, op)).get_output(0)

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        layer = self.net.add_shuffle(x)
        layer.reshape_dims = shape
        return layer.get_output(0)

    def slice(self, x: Any, start: tuple[int, ...], shape: tuple[int, ...]) -> Any:
        return self.net.add_slice(x, start, shape, (1,) * len(shape)).get_output(0)

    def cat(self, xs: list[Any], axis: int) -> Any:
        layer = self.net.add_concatenation(xs)
        layer.axis = axis
        return layer.get_output(0)

    def reduce(self, x: Any, op: str, axis: int, keep: bool = True) -> Any:
        return self.net.add_reduce(x, getattr(self.trt.ReduceOperation, op), 1 << axis, keep).get_output(0)

    def output(self, x: Any, name: str) -> None:
        x.name = name
        self.net.mark_output(x)

    def build(self, profile: Sequence[tuple[str, Sequence[Shape]]] = ()) -> bytes:
        """``profile``: the least, best and largest shape of each input whose shape is open."""
        config = self.builder.create_builder_config()
        if profile:
            shapes = self.builder.create_optimization_profile()
            for name, bounds in profile:
                shapes.set_shape(name, *bounds)
            config.add_optimization_profile(shapes)
        data = self.builder.build_serialized_network(self.net, config)
        if data is None:
            raise RuntimeError("TensorRT refused to build it")
        return bytes(data)


def has_bias(form: str) -> bool:
    return form in ("rows_bias", "matmul") or form.startswith("chunks")


def chunked(net: Net, q: Any, k: Any, v: Any, bias: Any, chunks: int) -> Any:
    """Attention over ``chunks`` pieces of the keys side by side, put together by their largest scores
    (Flash-Decoding): q [1, Hkv, group, D], k and v [1, Hkv, keys, D] -> [1, Hkv, group, D]."""
    _, heads, group, size = q.shape
    keys = k.shape[2]
    k, v = (net.reshape(x, (heads, chunks, keys // chunks, size)) for x in (k, v))
    q, bias = net.reshape(q, (heads, 1, group, size)), net.reshape(bias, (1, chunks, 1, keys // chunks))
    out = put_together(net, net.binary(net.matmul(q, k, tb=True), bias), v)
    return net.reshape(out, (1, heads, group, size))


def put_together(net: Net, scores: Any, v: Any, own: tuple[Any, Any] | None = None) -> Any:
    """Each piece by itself and then all by their largest scores: scores [Hkv, pieces, group, keys / pieces] and v
    [Hkv, pieces, keys / pieces, D] -> [Hkv, 1, group, D].

    ``own``: score [Hkv, 1, group, 1] and value [Hkv, 1, 1, D] of one more key.
    """
    most = net.reduce(scores, "MAX", 3)
    weights = net.unary(net.binary(scores, most, "SUB"), "EXP")
    total, out = net.reduce(weights, "SUM", 3), net.matmul(weights, v)
    highest = net.reduce(most, "MAX", 1)
    if own is not None:
        highest = net.binary(highest, own[0], "MAX")
    share = net.unary(net.binary(most, highest, "SUB"), "EXP")
    total = net.reduce(net.binary(total, share, "PROD"), "SUM", 1)
    out = net.reduce(net.binary(out, share, "PROD"), "SUM", 1)
    if own is not None:
        weight = net.unary(net.binary(own[0], highest, "SUB"), "EXP")
        total, out = net.binary(total, weight), net.binary(out, net.binary(weight, own[1], "PROD"))
    return net.binary(out, total, "DIV")


def attention_net(model: str, form: str, keys: int) -> Net:
    """q [1, Hq, 1, D] and k0, v0 ... [1, Hkv, keys, D or D + FOLDED] -> out; each layer's query is q + the last."""
    net, (heads, kv_heads, size) = Net(), HEADS[model]
    group, folded = heads // kv_heads, form.endswith("folded")
    width = size + (FOLDED if folded else 0)
    q = net.input("q", (1, heads, 1, size))
    bias = net.input("bias", (1, 1, 1, keys)) if has_bias(form) else None
    rows = 1 if form.startswith("native") else group
    mask = net.input("mask", (1, 1, rows, keys), "bool") if form.endswith("_mask") else None
    ones = np.zeros((1, heads, 1, FOLDED), np.float16)
    ones[..., 0] = 1
    query = q
    for i in range(CHAIN):
        k, v = net.input(f"k{i}", (1, kv_heads, keys, width)), net.input(f"v{i}", (1, kv_heads, keys, width))
        x = net.cat([query, net.const(ones)], 3) if folded else query
        if not form.startswith("native"):
            x = net.reshape(x, (1, kv_heads, group, width))
        if form.startswith("chunks"):
            out = chunked(net, x, k, v, bias, int(form[6:]))
        elif form == "matmul":
            scores = net.binary(net.matmul(x, k, tb=True), bias)
            softmax = net.net.add_softmax(scores)
            softmax.axes = 1 << 3
            out = net.matmul(softmax.get_output(0), v)
        else:
            layer = net.net.add_attention(x, k, v, net.trt.AttentionNormalizationOp.SOFTMAX, False)
            if mask is not None:
                layer.mask = mask
            elif bias is not None:
                row = net.slice(bias, (0, 0, 0, 0), (1, 1, 1, keys))
                layer.mask = net.cat([row] * group, 2) if group > 1 else row
            layer.decomposable = False
            out = layer.get_output(0)
        out = net.reshape(out, (1, heads, 1, width))
        if folded:
            out = net.slice(out, (0, 0, 0, 0), (1, heads, 1, size))
        query = net.binary(q, out)
    net.output(out, "out")
    return net


def attention_inputs(model: str, form: str, keys: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs by name, and what the network should give in fp32 [1, Hq, 1, D]."""
    heads, kv_heads, size = HEADS[model]
    draw = torch.Generator().manual_seed(keys)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).half()

    q = (rand(1, heads, 1, size) * size**-0.5).half()
    seen = keys if form in ("native", "rows") else keys - UNSEEN
    inputs, query = {"q": q}, q.float()
    for i in range(CHAIN):
        k, v = rand(1, kv_heads, keys, size), rand(1, kv_heads, keys, size) / 4
        out = torch.nn.functional.scaled_dot_product_attention(
            query, k[:, :, :seen].float(), v[:, :, :seen].float(), scale=1.0, enable_gqa=True
        )
        query = q.float() + out
        if form.endswith("folded"):
            extra = torch.zeros(1, kv_heads, keys, FOLDED).half()
            v = torch.cat([v, extra], -1)
            extra = extra.clone()
            extra[:, :, seen:, 0] = BLOCKED
            k = torch.cat([k, extra], -1)
        inputs |= {f"k{i}": k, f"v{i}": v}
    group = heads // kv_heads
    if has_bias(form):
        bias = torch.zeros(1, 1, 1, keys).half()
        bias[..., seen:] = BLOCKED
        inputs["bias"] = bias
    if form.endswith("_mask"):
        rows = 1 if form.startswith("native") else group
        inputs["mask"] = (torch.arange(keys) < seen).expand(1, 1, rows, keys).contiguous()
    return inputs, out


def linear(net: Net, x: Any, weight: np.ndarray, form: str) -> Any:
    """x [1, in] times weight [out, in] transposed, as [1, out]."""
    out, inner = weight.shape
    form, _, bits = form.partition("_int")
    small = net.weight(weight, int(bits or 16))
    if form == "nt":
        return net.matmul(x, small, tb=True)
    if form == "nn":
        return net.matmul(x, net.const(weight.T))
    if form == "column":
        return net.reshape(net.matmul(net.const(weight), net.reshape(x, (inner, 1))), (1, out))
    if form.startswith("rows"):
        rows = int(form[4:])
        padded = net.cat([x, net.const(np.zeros((rows - 1, inner), np.float16))], 0)
        return net.slice(net.matmul(padded, small, tb=True), (0, 0), (1, out))
    if form.startswith("split"):
        parts = int(form[5:])
        blocks = weight.reshape(out, parts, inner // parts).transpose(1, 0, 2)
        product = net.matmul(net.reshape(x, (parts, 1, inner // parts)), net.const(blocks), tb=True)
        return net.reduce(product, "SUM", 0, keep=False)
    if form == "conv":
        kept = np.ascontiguousarray(weight.reshape(out, inner, 1, 1))
        net.kept.append(kept)
        layer = net.net.add_convolution_nd(net.reshape(x, (1, inner, 1, 1)), out, (1, 1), net.trt.Weights(kept))
        return net.reshape(layer.get_output(0), (1, out))
    assert form == "reduce"
    return net.reshape(net.reduce(net.binary(small, x, "PROD"), "SUM", 1, keep=False), (1, out))


def linear_weights(model: str, part: str) -> list[list[np.ndarray]]:
    """Of each layer of the chain: [q+k+v, output, gate, up, down], or of the head alone."""
    hidden, qkv, out, inner, vocabulary = SIZES[model]
    shapes = [(qkv, hidden), (hidden, out), (inner, hidden), (inner, hidden), (hidden, inner)]
    draw = np.random.default_rng(0)

    def of(shape: tuple[int, int]) -> np.ndarray:
        return (draw.standard_normal(shape, np.float32) * 0.02).astype(np.float16)

    if part == "head":
        return [[of((vocabulary, hidden))]]
    count = -(-300_000_000 // (2 * sum(a * b for a, b in shapes)))
    return [[of(shape) for shape in shapes] for _ in range(count)]


def linear_net(model: str, form: str, part: str) -> Net:
    net, out_size = Net(), SIZES[model][2]
    x = net.input("x", (1, SIZES[model][0]))
    for weights in linear_weights(model, part):
        if part == "head":
            x = linear(net, x, weights[0], form)
            break
        qkv, out, gate, up, down = weights
        x = net.binary(x, linear(net, net.slice(linear(net, x, qkv, form), (0, 0), (1, out_size)), out, form))
        g = linear(net, x, gate, form)
        g = net.binary(g, net.net.add_activation(g, net.trt.ActivationType.SIGMOID).get_output(0), "PROD")
        x = net.binary(x, linear(net, net.binary(g, linear(net, x, up, form), "PROD"), down, form))
    net.output(x, "out")
    return net


def linear_inputs(model: str, form: str, part: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    x = torch.randn(1, SIZES[model][0], generator=torch.Generator().manual_seed(1)).half()
    y = x.float().cuda()
    for layer in linear_weights(model, part):
        weights = [torch.from_numpy(weight).cuda().float() for weight in layer]
        if part == "head":
            y = y @ weights[0].T
            break
        qkv, out, gate, up, down = weights
        y = y + (y @ qkv.T)[:, : SIZES[model][2]] @ out.T
        y = y + (torch.nn.functional.silu(y @ gate.T) * (y @ up.T)) @ down.T
    return {"x": x}, y.cpu()
