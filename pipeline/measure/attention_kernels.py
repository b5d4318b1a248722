"""Which attention kernels really ran, as the profiler saw them: a rival's row is only as fair as its kernels."""

from __future__ import annotations

import re
from collections.abc import Callable

UNKNOWN = "unknown"
"""No name told: Inductor may have taken attention apart, or nothing could be traced on this device."""

_OPERATOR = re.compile(r"aten::_scaled_dot_product_\w+")
_KERNEL = re.compile(r"(?!aten::)(?:void )?([\w:]*(?:flash|fmha|sdpa|attention)\w*)", re.IGNORECASE)


def attention_kernels(work: Callable[[], None]) -> list[str]:
    """Names of attention's operators and kernels in one call of ``work``, which is profiled; for between measurements,
    never within one.  ``["unknown"]`` where no name told."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    found = set()
    for event in profiler.key_averages():
        if operator := _OPERATOR.match(event.key):
            found.add(operator[0])
        elif event.device_type != torch.autograd.DeviceType.CPU and (kernel := _KERNEL.match(event.key)):
            found.add(kernel[1])
    return sorted(found) or [UNKNOWN]
