"""What every measurement shares: a warm-up that settles, a watch that nothing but the work ran, the peak of memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from passes.errors import RunError
from pipeline.host import gpu
from pipeline.measure.clock import Clock
from pipeline.measure.sections import Benchmark, Memory, Warmup

WARMUP_TOLERANCE = 0.01
WARMUP_LEAST_S = 0.2
"""Warm-up ends when the medians of two successive windows of passes differ by less than 1 %, but not sooner
than clocks need to rise."""

LAUNCH_BOUND = 0.8
"""Enqueue time above this share of device time: the host, not the device, sets the pace."""


class Bound(Protocol):
    @property
    def generation(self) -> int:
        """Goes up whenever anything is bound, built or captured."""


@dataclass(frozen=True)
class BenchmarkResult:
    benchmark: Benchmark
    samples: dict[str, dict[str, list[float]]]
    """Entry ("prefill", "prefill_1x512", "generate") -> clock ("device_ms", ...) -> raw samples in order of time."""

    def joined(self, later: BenchmarkResult) -> BenchmarkResult:
        """Both, of one run, prompts and then a generation: memory is from before the first to the peak of both."""
        first, last = self.benchmark.memory, later.benchmark.memory
        if first is not None and last is not None:
            last = replace(last, before_bytes=first.before_bytes)
        own, more = self.benchmark, later.benchmark
        both = replace(own, generate=more.generate, decode=more.decode, kernels=more.kernels, memory=last)
        return BenchmarkResult(both, {**self.samples, **later.samples})


def warm_up(work: Callable[[], object], clock: Clock, window: int, longest_s: float, least: int = 1) -> Warmup:
    """Repeat ``work`` until the rolling median of its latency over ``window`` settles, for ``longest_s`` at most,
    but at least ``least`` times."""
    latencies: list[int] = []
    clock.synchronize()
    start = clock.now_ns()
    while True:
        begin = clock.now_ns()
        work()
        clock.synchronize()
        end = clock.now_ns()
        latencies.append(end - begin)
        seconds = (end - start) / 1e9
        settled = seconds >= min(WARMUP_LEAST_S, longest_s) and _settled(latencies, window)
        if settled or (seconds >= longest_s and len(latencies) >= least):
            return Warmup(len(latencies), seconds, settled)


def _settled(latencies: Sequence[int], window: int) -> bool:
    if len(latencies) < 2 * window:
        return False
    recent = float(np.median(latencies[-window:]))
    earlier = float(np.median(latencies[-2 * window : -window]))
    return abs(recent - earlier) <= WARMUP_TOLERANCE * earlier


def blocks(least: int, seconds: float, most: int) -> Iterator[tuple[int, Callable[[int], None]]]:
    """Numbers of passes to time, until both ``least`` passes and ``seconds`` are reached (trtexec's rule), ``most``
    passes at most.

    Each comes with the function that is to be told how many nanoseconds they took.
    """
    spent: list[int] = []
    done, count = 0, least
    while count > 0:
        yield count, spent.append
        done += count
        passed = sum(spent) / 1e9
        if passed >= seconds:
            return
        wanted = math.ceil(1.1 * done * (seconds - passed) / passed) if passed > 0 else most
        count = min(wanted, most - done)


@contextmanager
def steady(runner: Bound) -> Iterator[None]:
    """Raises :class:`RunError` ("unsteady") when anything but passes happened inside."""
    before = _fingerprint(runner)
    yield
    after = _fingerprint(runner)
    changes = [f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
    if changes:
        raise RunError("unsteady", f"timed passes did more than run: {', '.join(changes)}; the numbers are void")


def _fingerprint(runner: Bound) -> dict[str, int]:
    import torch

    counts = {"generation of the runner": runner.generation, "graphs compiled by torch": 0}
    if "torch._dynamo" in sys.modules:  # else torch has compiled nothing
        from passes.private.of_torch import compiled_graphs

        counts["graphs compiled by torch"] = compiled_graphs()
    if torch.cuda.is_available():
        # A capture, too, takes memory of its own from the device.
        counts["device allocations"] = torch.cuda.memory_stats().get("num_device_alloc", 0)
    return counts


def conditions(
    before: gpu.GpuState, after: gpu.GpuState, warmup: Warmup, longest_s: float, drifting: Sequence[str]
) -> list[str]:
    """What speaks against the numbers of one measurement, one sentence each."""
    tainted = gpu.taints(before, after)
    tainted += [f"{name} drifted between the halves of the measurement" for name in drifting]
    if not warmup.settled:
        tainted.append(f"warm-up did not settle within {longest_s} s")
    return tainted


def memory_section(before: tuple[int, int] | None) -> Memory | None:
    """Device memory since ``before``, see :func:`pipeline.host.gpu.memory`.

    Neither TensorRT nor PyTorch's allocator gives back memory between passes, so what is held after the
    last one is the peak.
    """
    after = gpu.memory()
    if before is None or after is None:
        return None
    return Memory(before_bytes=before[0], peak_bytes=after[0], total_bytes=after[1])
