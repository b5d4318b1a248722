"""The state of the GPU, read and never set, and the two rates that bound what it can do.

NVML is asked before and after a measurement; :func:`taints` says what speaks against the numbers.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Any

from passes.errors import RunError

if TYPE_CHECKING:
    import torch

LIMITS = {
    "SwPowerCap": "software power cap",
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "software thermal slowdown",
    "HwThermalSlowdown": "hardware thermal slowdown",
    "HwPowerBrakeSlowdown": "hardware power brake",
}
"""NVML's ClocksEventReason that make a measurement doubtful -> our name.  Idle or user-set clocks do not."""

VIOLATION_SHARE = 0.01
"""Clocks held back for more than this share of a measurement taint it."""

MATMUL_SIZE = 8192
"""Rows, columns and depth of the product that stands for the card's matrix rate: it fills every card of today."""


@dataclass(frozen=True)
class Card:
    """Name, compute capability ("9.0") and driver version; None where there is no GPU or no driver."""

    name: str | None = None
    compute_capability: str | None = None
    driver: str | None = None


@dataclass(frozen=True)
class GpuState:
    """One reading.  What could not be read is None, and ``missing`` says why."""

    at_s: float
    """Host clock (monotonic, its own origin)."""
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    utilisation_percent: int | None = None
    memory_used_bytes: int | None = None
    foreign_processes: int | None = None
    """Processes on the card besides this one."""
    throttle_reasons: tuple[str, ...] | None = None
    """What holds the clocks back at this instant; values of ``LIMITS``."""
    power_limited_s: float | None = None
    """For how long, since the driver was loaded, the power limit held the clocks back."""
    thermally_limited_s: float | None = None
    missing: dict[str, str] = field(default_factory=dict)
    """Quantity -> why it could not be read; "nvml" stands for all of them."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def card() -> Card:
    """The card that PyTorch computes on, without importing torch where there is no NVIDIA driver."""
    with _nvml() as (nvml, _):
        if nvml is None:
            return Card()
        driver = nvml.nvmlSystemGetDriverVersion()
        handle, _ = _handle(nvml)
        if handle is None:
            return Card(driver=driver)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        return Card(nvml.nvmlDeviceGetName(handle), f"{major}.{minor}", driver)


def read_state() -> GpuState:
    """One reading of the card that PyTorch computes on; takes a few milliseconds.

    ``foreign_processes`` supposes that this process has a CUDA context.
    """
    now = time.perf_counter()
    with _nvml() as (nvml, why):
        if nvml is None:
            return GpuState(now, missing={"nvml": why})
        handle, why = _handle(nvml)
        if handle is None:
            return GpuState(now, missing={"nvml": why})
        quantities: dict[str, Callable[[], Any]] = {
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "utilisation_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "memory_used_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
            "foreign_processes": lambda: foreign(_processes(nvml, handle), os.getpid()),
            "throttle_reasons": lambda: _throttle_reasons(nvml, handle),
            "power_limited_s": lambda: _violation_s(nvml, handle, nvml.NVML_PERF_POLICY_POWER),
            "thermally_limited_s": lambda: _violation_s(nvml, handle, nvml.NVML_PERF_POLICY_THERMAL),
        }
        values: dict[str, Any] = {}
        missing: dict[str, str] = {}
        for name, read in quantities.items():
            try:
                values[name] = read()
            except nvml.NVMLError as error:
                missing[name] = str(error)
        return GpuState(now, **values, missing=missing)


def taints(before: GpuState, after: GpuState) -> list[str]:
    """What speaks against numbers measured between two readings, one sentence each; empty when nothing does."""
    reasons = []
    for name in LIMITS.values():
        when = [
            word for word, state in (("before", before), ("after", after)) if name in (state.throttle_reasons or ())
        ]
        if when:
            reasons.append(f"clocks held back by {name} {' and '.join(when)} the measurement")
    for what, key in (("the power limit", "power_limited_s"), ("temperature", "thermally_limited_s")):
        first, last = getattr(before, key), getattr(after, key)
        span = after.at_s - before.at_s
        if first is not None and last is not None and last - first > VIOLATION_SHARE * span:
            reasons.append(f"clocks held back by {what} for {(last - first) / span:.0%} of the measurement")
    processes = max(before.foreign_processes or 0, after.foreign_processes or 0)
    if processes:
        reasons.append(f"{processes} other process{'es' if processes > 1 else ''} on the GPU")
    missing = before.missing | after.missing
    reasons += [
        f"state of the GPU not known: {name}: {missing[name]}"
        for name in ("nvml", "throttle_reasons", "foreign_processes")
        if name in missing
    ]
    return reasons


def foreign(processes: set[int], own: int) -> int:
    """How many of the process ids on a card are not ``own``.

    In a container NVML may give the host's numbers, among which ours cannot be recognised; as we are on
    the card, one of those listed is us then.
    """
    return len(processes - {own}) if own in processes else max(len(processes) - 1, 0)


def _processes(nvml: ModuleType, handle: object) -> set[int]:
    lists = nvml.nvmlDeviceGetComputeRunningProcesses(handle), nvml.nvmlDeviceGetGraphicsRunningProcesses(handle)
    return {process.pid for processes in lists for process in processes}


def _throttle_reasons(nvml: ModuleType, handle: object) -> tuple[str, ...]:
    bits = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    return tuple(name for key, name in LIMITS.items() if bits & getattr(nvml, f"nvmlClocksEventReason{key}"))


def _violation_s(nvml: ModuleType, handle: object, policy: int) -> float:
    return nvml.nvmlDeviceGetViolationStatus(handle, policy).violationTime / 1e9  # nanoseconds, cumulative


@contextmanager
def _nvml() -> Iterator[tuple[ModuleType | None, str]]:
    """NVML, initialised; or None and the reason."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield None, str(error)
        return
    try:
        yield pynvml, ""
    finally:
        pynvml.nvmlShutdown()


def _handle(nvml: ModuleType) -> tuple[object | None, str]:
    """NVML's handle of the card that PyTorch computes on; or None and the reason.

    NVML counts cards in another order than CUDA and knows nothing of CUDA_VISIBLE_DEVICES, so the two are matched by
    PCI address, which is also that of the whole card under MIG.  A process that has not initialised CUDA is not made to
    where the environment says which card it is: one that jobs are forked from could not have it, and one that waits
    for them would lie on the card beside them.
    """
    import torch

    if not torch.cuda.is_available():
        return None, "PyTorch sees no CUDA device"
    try:
        if not torch.cuda.is_initialized() and (named := _named(nvml)) is not None:
            return named, ""
        card: Any = torch.cuda.get_device_properties(torch.cuda.current_device())  # torch's type stubs lack pci_*
        address = f"{card.pci_domain_id:08X}:{card.pci_bus_id:02X}:{card.pci_device_id:02X}.0"
        return nvml.nvmlDeviceGetHandleByPciBusId(address), ""
    except nvml.NVMLError as error:
        return None, str(error)


def _named(nvml: ModuleType) -> object | None:
    """NVML's handle of the first card that CUDA_VISIBLE_DEVICES lets through, where that leaves no doubt."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    alone = nvml.nvmlDeviceGetCount() == 1
    if first.startswith("GPU-"):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    if first.isdigit() and (alone or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"):
        return nvml.nvmlDeviceGetHandleByIndex(int(first))
    return None


@dataclass(frozen=True)
class Ceilings:
    """What the card itself reaches: the roof over every measurement."""

    copy_gb_per_s: float
    """Device-to-device copy, bytes read plus bytes written, in 1e9 bytes per second."""
    matmul_tflops: dict[str, float]
    """Precision -> 1e12 operations per second of a square product on random data."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_ceilings(precision: str) -> Ceilings:
    """Copy bandwidth and matrix rate at ``precision`` (fp16, bf16, fp32) on the current device, in under a second.

    fp32 runs as ``torch.backends.cuda.matmul`` says: without TF32 unless the caller allowed it.  Data are
    random because products of zeros draw less power and clock higher.  Raises :class:`RunError`.
    """
    import torch

    free_bytes, _ = torch.cuda.mem_get_info()
    try:
        ceilings = Ceilings(_copy_gb_per_s(free_bytes), {precision: _matmul_tflops(precision)})
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error, free_bytes) from error
    torch.cuda.empty_cache()  # the memory is the engine's
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

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    random = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype, device="cuda", generator=random) for _ in range(2))
    product = torch.empty_like(a)
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


def out_of_memory(error: BaseException, free_bytes: int | None) -> RunError:
    """``RunError("out_of_memory")`` that says what was needed and what was free."""
    needed = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    free = "an unknown amount" if free_bytes is None else f"{free_bytes / 2**30:.2f} GiB"
    return RunError(
        "out_of_memory",
        f"device memory: {needed[1] if needed else 'more than there was'} needed at once, {free} free; "
        "take a smaller batch, length or model",
    )


def memory() -> tuple[int, int] | None:
    """(used, total) bytes of the current device, of all processes and libraries; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free, total
