"""Builds the layers of a KV cache of fixed capacity: its update, and the attention of one token over it.

What is known (``benchmarks/kernels.py`` on an H200 with TensorRT-RTX 1.4, eight layers in a chain, fp16):

* The native layer at query length 1 is fast but right only where the number of keys is a power of two; at 2304 or
  3072 keys it drops some (relative error 0.4 to 0.8).  With a mask it does not build at query length 1, and with
  the heads of a group as rows and a mask it takes 54 us at 2048 keys, since it runs one block for each key-value head.
* Written out over pieces of the keys side by side (Flash-Decoding, Dao et al. 2023) attention takes 16 us at 2048 keys
  and 18 at 2304, with the mask, at any capacity, with a relative error of 1e-3.  That is the form used here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.cache_ops import CACHED, UPDATE
from passes.converters import as_tensor, reshaped, scaled
from passes.stack import Stack

CONVERTED = (UPDATE, CACHED)
BLOCKED = -30000.0
"""Added to the score of a key that must not be seen: fits fp16, and e to it is 0 in every type."""


def pieces(capacity: int) -> int:
    """Into how many pieces the keys are split: the fastest of 8, 16 and 32 in the map, from 512 to 8192 keys."""
    wanted = 16 if capacity >= 1024 else 8
    while capacity % wanted:
        wanted //= 2
    return wanted


def convert(stack: Stack, ctx: Any, node: Node, args: tuple[Any, ...], in_place: bool) -> Any:
    """The output tensor of ``node``, one of :data:`CONVERTED`; ``args`` with tensors in the place of nodes.

    ``in_place``: the cache is updated where it lies by TensorRT's own layer, whose output must be bound to the
    address of its input.
    """
    if node.target is CACHED:
        return _attention(stack, ctx, node, args)
    cache, new, position = args
    position = as_tensor(ctx, position, f"{node.name} [position]")
    if in_place:
        places = ctx.net.add_cast(position, stack.trt.int32).get_output(0)
        return ctx.net.add_kv_cache_update(cache, new, places, stack.trt.KVCacheMode.LINEAR).get_output(0)
    # A new cache: ``new`` [B, H, 1, D] at its place, the old one everywhere else.
    batch, _, capacity, _ = cache.shape
    equal = stack.trt.ElementWiseOperation.EQUAL
    here = reshaped(ctx.net, _compared(ctx, node, position, batch, capacity, equal), (batch, 1, capacity, 1))
    return ctx.net.add_select(here, new, cache).get_output(0)


def _compared(ctx: Any, node: Node, position: Any, batch: int, capacity: int, operation: Any) -> Any:
    """``place operation position[b]`` for every place of the cache: bool [batch, capacity]."""
    places = as_tensor(ctx, torch.arange(capacity, dtype=torch.int64).unsqueeze(0), f"{node.name} [places]")
    return ctx.net.add_elementwise(places, reshaped(ctx.net, position, (batch, 1)), operation).get_output(0)


def _attention(stack: Stack, ctx: Any, node: Node, args: tuple[Any, ...]) -> Any:
    """Softmax over every piece of the keys by itself, and the pieces put together by their largest scores."""
    query, key, value, position, scale = args
    net, trt = ctx.net, stack.trt
    batch, heads, capacity, size = key.shape
    group, count = query.shape[1] // heads, pieces(capacity)
    rows = (batch, heads) if batch > 1 else (heads,)
    at = len(rows)  # the axis of the pieces
    if scale != 1.0:
        query = scaled(stack, ctx, query, scale, node)
    query = reshaped(net, query, (*rows, 1, group, size))
    key = reshaped(net, key, (*rows, count, capacity // count, size))
    value = reshaped(net, value, (*rows, count, capacity // count, value.shape[3]))

    unseen = _compared(ctx, node, position, batch, capacity, trt.ElementWiseOperation.GREATER)
    unseen = reshaped(net, unseen, (*((batch, 1) if batch > 1 else (1,)), count, 1, capacity // count))
    dtype = node.meta["val"].dtype
    blocked, zero = (
        as_tensor(ctx, torch.full((1,) * (at + 3), number, dtype=dtype), f"{node.name} [{number}]")
        for number in (BLOCKED, 0.0)
    )
    bias = net.add_select(unseen, blocked, zero).get_output(0)

    def binary(a: Any, b: Any, operation: str) -> Any:
        return net.add_elementwise(a, b, getattr(trt.ElementWiseOperation, operation)).get_output(0)

    def reduced(x: Any, operation: str, axis: int) -> Any:
        return net.add_reduce(x, getattr(trt.ReduceOperation, operation), 1 << axis, True).get_output(0)

    def exp(x: Any) -> Any:
        return net.add_unary(x, trt.UnaryOperation.EXP).get_output(0)

    none, turned = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE
    scores = binary(net.add_matrix_multiply(query, none, key, turned).get_output(0), bias, "SUM")
    most = reduced(scores, "MAX", at + 2)
    weights = exp(binary(scores, most, "SUB"))
    total = reduced(weights, "SUM", at + 2)
    out = net.add_matrix_multiply(weights, none, value, none).get_output(0)
    share = exp(binary(most, reduced(most, "MAX", at), "SUB"))
    total = reduced(binary(total, share, "PROD"), "SUM", at)
    out = reduced(binary(out, share, "PROD"), "SUM", at)
    return reshaped(net, binary(out, total, "DIV"), (batch, heads * group, 1, value.shape[-1]))
