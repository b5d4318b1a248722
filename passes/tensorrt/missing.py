"""Converters of operations that Torch-TensorRT has none for, or a wrong one, where lengths are dynamic.

* ``cumsum``: its converter adds the elements up in a loop from a float zero, so whole numbers, the positions that OPT
  makes of a mask, come out as fp32.  TensorRT has a layer for it, in the type of its input.
* ``gather``: its converter is right, but does not say that it is for dynamic lengths too, and is then not used.
* ``log1p``: likewise (Llama 4 scales the queries of layers without rotary positions by it).  As there, the logarithm of
  the sum: near 0 no better than that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.tensorrt.attention import as_tensor
from passes.tensorrt.versions import Stack

CUMSUM = torch.ops.aten.cumsum.default
GATHER = torch.ops.aten.gather.default
LOG1P = torch.ops.aten.log1p.default
CONVERTED = (CUMSUM, GATHER, LOG1P)


def convert(stack: Stack, ctx: Any, node: Node, args: tuple[Any, ...]) -> Any:
    """The output tensor of ``node``, one of :data:`CONVERTED`; ``args`` with tensors in the place of nodes."""
    source, rank = as_tensor(ctx, args[0], f"{node.name} [input]"), node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    made = stack.torch_tensorrt.dtype.try_from(node.meta["val"].dtype).to(stack.trt.DataType)
    if node.target is not GATHER and source.dtype != made:  # PyTorch sums bool and small integers as int64
        source = ctx.net.add_cast(source, made).get_output(0)
    if node.target is LOG1P:
        one = as_tensor(ctx, torch.ones((1,) * rank, dtype=node.meta["val"].dtype), f"{node.name} [one]")
        more = ctx.net.add_elementwise(source, one, stack.trt.ElementWiseOperation.SUM).get_output(0)
        layer = ctx.net.add_unary(more, stack.trt.UnaryOperation.LOG)
        layer.name = node.name
        return layer.get_output(0)
    axis = args[1] % max(rank, 1)
    if node.target is GATHER:
        index = as_tensor(ctx, args[2], f"{node.name} [index]")
        layer = ctx.net.add_gather_v2(source, index, stack.trt.GatherMode.ELEMENT)
        layer.axis = axis
    else:
        along = as_tensor(ctx, torch.tensor(axis, dtype=torch.int32), f"{node.name} [axis]")
        layer = ctx.net.add_cumulative(source, along, stack.trt.CumulativeOperation.SUM, False, False)
    layer.name = node.name
    return layer.get_output(0)
