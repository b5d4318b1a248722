"""The state of the GPU, read and never set.

NVML is asked before and after a measurement; :func:`taints` says what speaks against the numbers.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from passes.errors import RunError

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
    """Processes on the card besides this one and those that are known to wait."""
    waiting_processes: int | None = None
    """Processes on the card that launch nothing, since they wait for their turn."""
    throttle_reasons: tuple[str, ...] | None = None
    """What holds the clocks back at this instant; values of ``LIMITS``."""
    power_limited_s: float | None = None
    """For how long, since the driver was loaded, the power limit held the clocks back."""
    thermally_limited_s: float | None = None
    missing: dict[str, str] = field(default_factory=dict)
    """Quantity -> why it could not be read; "nvml" stands for all of them."""


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


def read_state(waiting: Collection[int] = ()) -> GpuState:
    """One reading of the card that PyTorch computes on; takes a few milliseconds.

    ``waiting``: ids of processes that are known to launch nothing.  ``foreign_processes`` supposes that this process
    has a CUDA context.
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
            "foreign_processes": lambda: foreign(set(_processes(nvml, handle)) - set(waiting), os.getpid()),
            "waiting_processes": lambda: len(_processes(nvml, handle).keys() & set(waiting)),
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


def _processes(nvml: ModuleType, handle: object) -> dict[int, int | None]:
    """Ids of the processes on the card, and the bytes that each holds there, where NVML knows."""
    lists = nvml.nvmlDeviceGetComputeRunningProcesses(handle), nvml.nvmlDeviceGetGraphicsRunningProcesses(handle)
    return {process.pid: process.usedGpuMemory for processes in lists for process in processes}


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


def out_of_memory(error: BaseException, free_bytes: int | None) -> RunError:
    """``RunError("out_of_memory")`` that says what was needed and what was free."""
    needed = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
    return no_room(needed[1] if needed else "more than there was", free_bytes)


def no_room(needed: str, free_bytes: int | None) -> RunError:
    """The same, where what was ``needed`` is known."""
    free = "an unknown amount" if free_bytes is None else f"{free_bytes / 2**30:.2f} GiB"
    return RunError(
        "out_of_memory",
        f"device memory: {needed} needed at once, {free} free; take a smaller batch, length or model",
    )


def free_bytes() -> int | None:
    """Free memory of the current device; None without one."""
    import torch

    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def give_back() -> None:
    """Give what PyTorch holds of the device and does not use back to it.

    cuBLAS' workspace goes first: it is made at a process's first product, in a piece of what was free then, and a block
    of which a piece is in use is kept whole, were it that of a model's weights, 5 GB for the 32 MB of an H100's.
    """
    import torch

    from passes.private.of_torch import drop_workspaces

    if torch.cuda.is_available():
        drop_workspaces()
        torch.cuda.empty_cache()


def context_bytes() -> int | None:
    """Device memory of this process once CUDA is ready, see :func:`memory`."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()  # makes CUDA's context
    return None if (found := memory()) is None else found[0]


def memory() -> tuple[int, int] | None:
    """(used, total) bytes of the current device: used by all libraries of this process, or of all processes where NVML
    does not tell them apart; None without a device."""
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    with _nvml() as (nvml, _):
        handle = None if nvml is None else _handle(nvml)[0]
        if nvml is None or handle is None:
            return total - free, total
        try:
            own = _processes(nvml, handle).get(os.getpid())
        except nvml.NVMLError:
            own = None
    return own or total - free, total
