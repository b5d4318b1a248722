"""The product of one row with a weight, element by element and summed: one kernel, with what makes the row fused in.

A sum may be taken in pieces that lie side by side, in fp32, so that each thread has several reads under way.  Measured
kernel by kernel on an H100 with TensorRT-RTX 1.6 (``python -m benchmarks.kernels step``, forms ``merged@xN``;
docs/generation.md): two pieces help where a weight has more outputs than inputs (gate and up of Llama 3.2 1B 24.6 to
23.5 us, query, key and value 7.1 to 6.4), and cost where it has fewer (down 13.4 to 17.4, output 4.9 to 5.5); four and
eight cost everywhere, and so do pieces of int8, which is cast in the same kernel.
"""

from __future__ import annotations

from typing import Any

from passes.tensorrt.attention import reshaped
from passes.tensorrt.versions import Stack

PIECES = 2
"""Of the inputs of a weight that has more outputs."""
SIDE_BY_SIDE = 8
"""Elements that a thread reads at once."""


def times_row(stack: Stack, net: Any, weight: Any, row: Any, whole: bool = False) -> Any:
    """``weight`` [out, in] times ``row`` [1, in], as [out] in their type; ``whole``: never in pieces."""
    trt, (out, inner) = stack.trt, weight.shape
    if whole or out <= inner or inner % (PIECES * SIDE_BY_SIDE):
        terms = net.add_elementwise(weight, row, trt.ElementWiseOperation.PROD).get_output(0)
        return net.add_reduce(terms, trt.ReduceOperation.SUM, 1 << 1, False).get_output(0)
    shape = (PIECES, inner // PIECES)
    weight, row = reshaped(net, weight, (out, *shape)), reshaped(net, row, (1, *shape))
    terms = net.add_elementwise(weight, row, trt.ElementWiseOperation.PROD).get_output(0)
    total = net.add_cast(terms, trt.float32).get_output(0)
    for _ in shape:
        total = net.add_reduce(total, trt.ReduceOperation.SUM, 1 << 1, False).get_output(0)
    return net.add_cast(total, terms.dtype).get_output(0)
