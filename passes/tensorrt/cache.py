"""Builds the layers of a KV cache of fixed capacity: its update, what a chunk of a prompt reads of it, and the
attention of one token over it.

What is known (``benchmarks/kernels.py`` on an H100 with TensorRT-RTX 1.6, Llama 3.2 1B, fp16; docs/generation.md):

* The native layer with a mask is right at query length 1, whatever the number of keys, but slow: 44 us at 2048 keys and
  52 at 2176, and a decoder layer with it takes 110 us.
* Matrix products of one row split their work over few blocks, and TensorRT copies keys and values between the update of
  the cache and such a product: over 16 pieces of the keys side by side, a decoder layer takes 80 us.
* Products element by element with their sums read the caches as they lie, and take the mask, the softmax and the
  division into their kernels.  They are fast where the sum is over what lies side by side: over the channels of a
  key, and over the keys of a channel of the values, which is why the cache holds values with the keys' axis last.
  That is the form used here: a decoder layer takes 71 us, and 97 with values that lie as the keys do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.graph.cache_ops import CACHED, READ, UPDATE
from passes.tensorrt.attention import as_tensor, reshaped, scaled
from passes.tensorrt.versions import Stack

CONVERTED = (UPDATE, READ, CACHED)
BLOCKED = -1e30
"""Added, in fp32, to the score of a key that must not be seen: far below every score, and e to it is 0."""


def convert(stack: Stack, ctx: Any, node: Node, args: tuple[Any, ...], in_place: bool) -> Any:
    """The output tensor of ``node``, one of :data:`CONVERTED`; ``args`` with tensors in the place of nodes.

    ``in_place``: the cache is updated where it lies by TensorRT's own layer, whose output must be bound to the
    address of its input.
    """
    if node.target is CACHED:
        return _attention(stack, ctx, node, args)
    if node.target is READ:
        return _read(stack, ctx, node, *args)
    cache, new, position, *ring = args
    position = as_tensor(ctx, position, f"{node.name} [position]")
    if any(ring):
        position = _round(stack, ctx, node, position, cache.shape[2])
    if in_place:
        places = ctx.net.add_cast(position, stack.trt.int32).get_output(0)
        return ctx.net.add_kv_cache_update(cache, new, places, stack.trt.KVCacheMode.LINEAR).get_output(0)
    # A new cache: ``new`` [B, H, 1, D] at its place, the old one everywhere else.
    batch, _, capacity, _ = cache.shape
    equal = stack.trt.ElementWiseOperation.EQUAL
    here = reshaped(ctx.net, _compared(ctx, node, position, batch, capacity, equal), (batch, 1, capacity, 1))
    return ctx.net.add_select(here, new, cache).get_output(0)


def _read(stack: Stack, ctx: Any, node: Node, cache: Any, places: Any, last: bool = False) -> Any:
    """As many places of ``cache`` [batch, heads, capacity, size] as ``places`` [1, S] has, the first or the last."""
    net, sizes, known = ctx.net, list(cache.shape), max(places.shape[1], 0)
    start = sizes[2] - known if last else 0
    layer = net.add_slice(cache, (0, 0, start, 0), (*sizes[:2], known, sizes[3]), (1,) * 4)
    if places.shape[1] < 0:
        count = net.add_slice(net.add_shape(places).get_output(0), (1,), (1,), (1,)).get_output(0)

        def along(before: list[int], rows: Any, behind: list[int]) -> Any:
            first, end = (as_tensor(ctx, torch.tensor(each), f"{node.name} {each}") for each in (before, behind))
            return net.add_concatenation([first, rows, end]).get_output(0)

        layer.set_input(2, along(sizes[:2], count, sizes[3:]))
        if last:
            whole = as_tensor(ctx, torch.tensor(sizes[2:3]), f"{node.name} [capacity]")
            rest = net.add_elementwise(whole, count, stack.trt.ElementWiseOperation.SUB).get_output(0)
            layer.set_input(1, along([0, 0], rest, [0]))
    layer.name = f"{node.name} [{'last' if last else 'first'} places]"
    return layer.get_output(0)


def _compared(ctx: Any, node: Node, position: Any, batch: int, capacity: int, operation: Any) -> Any:
    """``place operation position[b]`` for every place of the cache: bool [batch, capacity]."""
    place = reshaped(ctx.net, position, (batch, 1))
    return ctx.net.add_elementwise(_places(ctx, node, capacity), place, operation).get_output(0)


def _places(ctx: Any, node: Node, capacity: int) -> Any:
    """[1, capacity] int64."""
    return as_tensor(ctx, torch.arange(capacity, dtype=torch.int64).unsqueeze(0), f"{node.name} [places]")


def _round(stack: Stack, ctx: Any, node: Node, position: Any, capacity: int) -> Any:
    """``position % capacity`` of numbers from 0 on."""
    kinds = stack.trt.ElementWiseOperation
    whole = as_tensor(ctx, torch.full((1,) * len(position.shape), capacity), f"{node.name} [capacity]")
    times = ctx.net.add_elementwise(position, whole, kinds.FLOOR_DIV).get_output(0)
    turns = ctx.net.add_elementwise(times, whole, kinds.PROD).get_output(0)
    return ctx.net.add_elementwise(position, turns, kinds.SUB).get_output(0)


def _unseen(stack: Stack, ctx: Any, node: Node, position: Any, batch: int, capacity: int, width: int | None) -> Any:
    """Which places of the cache row b does not see: bool [batch, capacity]."""
    kinds = stack.trt.ElementWiseOperation
    if width is None:
        return _compared(ctx, node, position, batch, capacity, kinds.GREATER)
    place = reshaped(ctx.net, position, (batch, 1))

    def number(value: int) -> Any:
        return as_tensor(ctx, torch.full((1, 1), value), f"{node.name} [{value}]")

    def binary(a: Any, b: Any, kind: Any) -> Any:
        return ctx.net.add_elementwise(a, b, kind).get_output(0)

    behind = binary(_round(stack, ctx, node, place, capacity), _places(ctx, node, capacity), kinds.SUB)
    later = binary(behind, number(0), kinds.LESS)  # of the turn before
    age = ctx.net.add_select(later, binary(behind, number(capacity), kinds.SUM), behind).get_output(0)
    too_old = binary(age, number(width - 1), kinds.GREATER)
    return binary(too_old, binary(age, place, kinds.GREATER), kinds.OR)


def _attention(stack: Stack, ctx: Any, node: Node, args: tuple[Any, ...]) -> Any:
    """Scores, their softmax and the weighted values, the products element by element and in fp32 from there on."""
    query, key, value, position, scale, *width = args
    net, trt = ctx.net, stack.trt
    batch, heads, capacity, size = key.shape
    group, channels = query.shape[1] // heads, value.shape[-1]
    rows = (batch, heads) if batch > 1 else (heads,)
    at = len(rows) + 1  # the axis of the keys in [rows, group, keys]
    if scale != 1.0:
        query = scaled(stack, ctx, query, scale, node)
    turned = net.add_shuffle(value)
    turned.first_transpose = (0, 1, 3, 2)  # as it lies in the cache

    def binary(a: Any, b: Any, operation: str) -> Any:
        return net.add_elementwise(a, b, getattr(trt.ElementWiseOperation, operation)).get_output(0)

    def reduced(x: Any, operation: str, axis: int, keep: bool = True) -> Any:
        return net.add_reduce(x, getattr(trt.ReduceOperation, operation), 1 << axis, keep).get_output(0)

    def cast(x: Any, dtype: Any) -> Any:
        return net.add_cast(x, dtype).get_output(0)

    def summed(a: Any, b: Any) -> Any:
        return reduced(cast(binary(a, b, "PROD"), trt.float32), "SUM", at + 1, keep=False)

    unseen = _unseen(stack, ctx, node, position, batch, capacity, *(width or [None]))
    unseen = reshaped(net, unseen, (*((batch, 1) if batch > 1 else (1,)), 1, capacity))
    blocked, zero = (
        as_tensor(ctx, torch.full((1,) * (at + 1), number), f"{node.name} [{number}]") for number in (BLOCKED, 0.0)
    )
    bias = net.add_select(unseen, blocked, zero).get_output(0)
    key = reshaped(net, key, (*rows, 1, capacity, size))
    scores = binary(summed(key, reshaped(net, query, (*rows, group, 1, size))), bias, "SUM")
    exponent = binary(scores, reduced(scores, "MAX", at), "SUB")
    # Rounded before they are added up, so that all that is written of them is half as large.
    weights = cast(net.add_unary(exponent, trt.UnaryOperation.EXP).get_output(0), query.dtype)
    total = reduced(cast(weights, trt.float32), "SUM", at)
    weights = reshaped(net, weights, (*rows, group, 1, capacity))
    out = summed(reshaped(net, turned.get_output(0), (*rows, 1, channels, capacity)), weights)
    out = cast(binary(out, total, "DIV"), query.dtype)
    return reshaped(net, out, (batch, heads * group, 1, channels))
