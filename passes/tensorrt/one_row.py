"""The product of one row with a weight, element by element and summed: one kernel, with what makes the row fused in.

The sum is taken in pieces that lie side by side, in fp32 (``python -m benchmarks.kernels step``; docs/generation.md):
TensorRT then has as many reads under way at once in each thread, and gives an output to one warp instead of to a block.
"""

from __future__ import annotations

from typing import Any

from passes.tensorrt.attention import reshaped
from passes.tensorrt.versions import Stack

PIECES = 4
"""Of the inputs of a weight as it is."""
PIECES_OF_INT8 = 4
"""Of one whose elements are bytes: they are cast in the same kernel."""
SIDE_BY_SIDE = 8
"""Elements that a thread reads at once."""


def times_row(stack: Stack, net: Any, weight: Any, row: Any, most: int = PIECES) -> Any:
    """``weight`` [out, in] times ``row`` [1, in], as [out] in their type; in at most ``most`` pieces of one size."""
    trt, (out, inner) = stack.trt, weight.shape
    pieces = next(n for n in range(most, 0, -1) if n == 1 or inner % (n * SIDE_BY_SIDE) == 0)
    if pieces == 1:
        terms = net.add_elementwise(weight, row, trt.ElementWiseOperation.PROD).get_output(0)
        return net.add_reduce(terms, trt.ReduceOperation.SUM, 1 << 1, False).get_output(0)
    shape = (pieces, inner // pieces)
    weight, row = reshaped(net, weight, (out, *shape)), reshaped(net, row, (1, *shape))
    terms = net.add_elementwise(weight, row, trt.ElementWiseOperation.PROD).get_output(0)
    total = net.add_cast(terms, trt.float32).get_output(0)
    for _ in shape:
        total = net.add_reduce(total, trt.ReduceOperation.SUM, 1 << 1, False).get_output(0)
    return net.add_cast(total, terms.dtype).get_output(0)
