"""The two rates that bound what a GPU can do, measured on the card itself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from passes.precision import BASES, PRECISIONS
from passes.private.of_torch import scaled_product
from pipeline.host import gpu
from pipeline.measure.sections import Ceilings

if TYPE_CHECKING:
    import torch

MATMUL_SIZE = 8192
"""Rows, columns and depth of the product that stands for the card's matrix rate: it fills every card of today."""


def measure(precision: str) -> Ceilings:
    """Copy bandwidth and matrix rate at ``precision`` (fp16, bf16, fp32; fp8: rows and weights in E4M3) on the current
    device, in under a second.

    fp32 runs as ``torch.backends.cuda.matmul`` says: without TF32 unless the caller allowed it.  Data are
    random because products of zeros draw less power and clock higher.  Raises :class:`RunError`.
    """
    import torch

    free_bytes, _ = torch.cuda.mem_get_info()
    try:
        ceilings = Ceilings(_copy_gb_per_s(free_bytes), {precision: _matmul_tflops(precision)})
    except torch.OutOfMemoryError as error:
        raise gpu.out_of_memory(error, free_bytes) from error
    gpu.give_back()  # the memory is the engine's
    return ceilings


def _copy_gb_per_s(free_bytes: int) -> float:
    import torch

    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    size = min(max(16 * l2_bytes, 2**30), free_bytes // 4)  # well above the cache, else the cache is measured
    source = torch.empty(size, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return 2 * size / _median_ms(lambda: target.copy_(source)) / 1e6


def _matmul_tflops(precision: str) -> float:
    import torch

    dtype = PRECISIONS[precision if precision in PRECISIONS else BASES[0]].dtype
    random = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype, device="cuda", generator=random) for _ in range(2))
    product = torch.empty_like(a)
    if precision not in PRECISIONS:
        return 2 * MATMUL_SIZE**3 / _median_ms(scaled_product(a, b)) / 1e9
    return 2 * MATMUL_SIZE**3 / _median_ms(lambda: torch.mm(a, b, out=product)) / 1e9


def _median_ms(work: Callable[[], torch.Tensor], warmup: int = 3, iterations: int = 10) -> float:
    """Median device time of ``work`` in milliseconds; back to back, so that launching is hidden."""
    import numpy as np
    import torch

    for _ in range(warmup):
        work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return float(np.median([a.elapsed_time(b) for a, b in pairwise(events)]))
