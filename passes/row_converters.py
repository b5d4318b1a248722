"""Builds the product of one row with a weight: what a decode step of a batch of one consists of.

Measured (``benchmarks/kernels.py`` on an H200 with TensorRT-RTX 1.4, fp16, Llama 3.2 1B): as a matrix product the
head [128256, 2048] takes 148 us; as a product element by element and its sums, which TensorRT fuses into one kernel
together with what made the row, 125 us, that is 4.2 TB/s; the down projection with the activation before it takes 11 us
instead of 18.  Where several products share one row, or the row is a residual sum that is read again, the fused kernel
is up to five times slower than the matrix products, which are then merged into one launch: those stay as they are.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.fx import Node

from passes.converters import as_tensor, reshaped
from passes.stack import Stack

LINEAR = torch.ops.aten.linear.default


def applies(node: Node) -> bool:
    """Whether ``node`` is the only product of its row, and that row is the only one."""
    if node.target is not LINEAR:
        return False
    row: Any = node.args[0]
    sizes = row.meta["val"].shape[:-1] if "val" in row.meta else (0,)
    return all(isinstance(size, int) for size in sizes) and prod(sizes) == 1 and len(row.users) == 1


def convert(stack: Stack, ctx: Any, node: Node, args: tuple[Any, ...]) -> Any:
    """The output [..., out] of ``node``: row [..., in], weight [out, in], and maybe a bias [out]."""
    net, trt = ctx.net, stack.trt
    row, weight, *bias = args
    out, inner = node.args[1].meta["val"].shape  # type: ignore[union-attr]
    row = reshaped(net, row, (1, inner))
    products = net.add_elementwise(
        as_tensor(ctx, weight, f"{node.name} [weight]"), row, trt.ElementWiseOperation.PROD
    ).get_output(0)
    result = net.add_reduce(products, trt.ReduceOperation.SUM, 1 << 1, False).get_output(0)
    if bias and bias[0] is not None:
        bias_tensor = as_tensor(ctx, bias[0], f"{node.name} [bias]")
        result = net.add_elementwise(result, bias_tensor, trt.ElementWiseOperation.SUM).get_output(0)
    return reshaped(net, result, (*node.meta["val"].shape[:-1], out))
