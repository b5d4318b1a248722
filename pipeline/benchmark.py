"""Measures one forward pass over a whole prompt (prefill): device time, host latency, enqueue time.

Device time has a loop of its own, in which passes follow each other without a wait, so that it is the
device's.  Host latency and enqueue time share the other, in which the device is idle before each pass:
with work queued up, a launch would wait for room in the queue and enqueue time would be the device's again.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from passes.errors import RunError
from pipeline import gpu
from pipeline.clock import Clock, CudaClock
from pipeline.config import BenchmarkConfig
from pipeline.memory import collector_paused
from pipeline.roofline import DecoderCost, prefill_floor_s
from pipeline.statistics import drifts, summarise

if TYPE_CHECKING:
    import torch

MAX_ITERATIONS = 20_000
"""Upper bound of a loop, unless ``min_iterations`` asks for more: events and samples are held in memory."""

LAUNCH_BOUND = 0.8
"""Enqueue time above this share of device time: the host, not the device, sets the pace."""

WARMUP_WINDOW = 10
WARMUP_TOLERANCE = 0.01
WARMUP_LEAST_S = 0.2
"""Warm-up ends when the medians of two successive windows of passes differ by less than 1 %, but not sooner
than clocks need to rise."""


class Runner(Protocol):
    """What can be measured: an engine, or a rival."""

    @property
    def stream(self) -> torch.cuda.Stream: ...

    @property
    def cuda_graph(self) -> bool:
        """Whether a pass really is the replay of a CUDA graph."""

    @property
    def generation(self) -> int:
        """Goes up whenever anything is bound, built or captured.  It may not move while passes are timed."""

    def prepare(self, batch: int, length: int) -> None:
        """Allocate inputs and outputs for exactly [batch, length] tokens and bind them."""

    def enqueue(self) -> None:
        """Launch one forward pass on the current stream; wait for nothing and allocate nothing."""


@dataclass(frozen=True)
class BenchmarkResult:
    report: dict[str, Any]
    """The report's ``benchmark`` section."""
    samples: dict[str, dict[str, list[float]]]
    """Entry ("prefill", "prefill_1x512") -> clock ("device_ms", ...) -> raw samples in order of time."""


@dataclass(frozen=True)
class Warmup:
    iterations: int
    seconds: float
    settled: bool


def measure(
    runner: Runner,
    config: BenchmarkConfig,
    cost: DecoderCost | None = None,
    ceilings: gpu.Ceilings | None = None,
    precision: str = "fp16",
    clock: Clock | None = None,
    read_state: Callable[[], gpu.GpuState] = gpu.read_state,
) -> BenchmarkResult:
    """Measure every shape of ``config``; the first is the headline.

    ``cost`` and ``ceilings`` (:func:`pipeline.gpu.measure_ceilings` at ``precision``) give the roofline
    fraction, which is None without them.  Raises :class:`RunError`: ``out_of_memory``, or ``unsteady`` when
    something was compiled, captured, bound or allocated while passes were timed.
    """
    clock = clock or CudaClock(runner.stream)
    memory_before = gpu.memory()
    entries: list[dict[str, Any]] = []
    samples: dict[str, dict[str, list[float]]] = {}
    for shape in config.shapes:
        entry, times = _measure_shape(runner, config, shape.batch, shape.input_length, clock, read_state)
        floor_s = None
        if cost is not None and ceilings is not None:
            floor_s = prefill_floor_s(
                cost, shape.batch, shape.input_length, ceilings.copy_gb_per_s, ceilings.matmul_tflops[precision]
            )
        entry["floor_ms"] = None if floor_s is None else floor_s * 1e3
        entry["roofline_fraction"] = None if floor_s is None else floor_s * 1e3 / entry["device_ms"]["median"]
        samples[f"prefill_{shape.batch}x{shape.input_length}" if entries else "prefill"] = times
        entries.append(entry)
    report: dict[str, Any] = {"prefill": entries[0]} if entries else {}
    if len(entries) > 1:
        report["prefill_shapes"] = entries[1:]
    report["ceilings"] = None if ceilings is None else ceilings.to_dict()
    report["memory"] = _memory_section(memory_before)
    return BenchmarkResult(report, samples)


def _measure_shape(
    runner: Runner,
    config: BenchmarkConfig,
    batch: int,
    length: int,
    clock: Clock,
    read_state: Callable[[], gpu.GpuState],
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    import torch

    held = gpu.memory()
    try:
        gc.collect()
        with clock.on_stream(), collector_paused():
            runner.prepare(batch, length)
            warmup = _warm_up(runner, config, clock)
            before = read_state()
            with _steady(runner):
                device_ms = _device_loop(runner, config, clock)
                host_ms, enqueue_ms = _host_loop(runner, config, clock)
            after = read_state()
    except torch.OutOfMemoryError as error:
        raise gpu.out_of_memory(error, None if held is None else held[1] - held[0]) from error
    times = {"device_ms": device_ms, "host_ms": host_ms, "enqueue_ms": enqueue_ms}
    summaries = {name: summarise(values) for name, values in times.items()}
    drifting = [name for name in ("device_ms", "host_ms") if drifts(times[name])]
    tainted = gpu.taints(before, after)
    tainted += [f"{name} drifted between the halves of the measurement" for name in drifting]
    if not warmup.settled:
        tainted.append(f"warm-up did not settle within {config.warmup_seconds} s")
    entry = {
        "batch": batch,
        "input_length": length,
        **summaries,
        "tokens_per_s": batch * length / (summaries["host_ms"]["median"] / 1e3),
        "launch_bound": summaries["enqueue_ms"]["median"] > LAUNCH_BOUND * summaries["device_ms"]["median"],
        "cuda_graph": runner.cuda_graph,
        "drift": bool(drifting),
        "tainted": tainted,
        "warmup": asdict(warmup),
        "gpu": {"before": before.to_dict(), "after": after.to_dict()},
    }
    return entry, times


def _warm_up(runner: Runner, config: BenchmarkConfig, clock: Clock) -> Warmup:
    """Run passes until the rolling median of their latency settles, for ``warmup_seconds`` at most."""
    latencies: list[int] = []
    clock.synchronize()
    start = clock.now_ns()
    while True:
        begin = clock.now_ns()
        runner.enqueue()
        clock.synchronize()
        end = clock.now_ns()
        latencies.append(end - begin)
        seconds = (end - start) / 1e9
        settled = seconds >= min(WARMUP_LEAST_S, config.warmup_seconds) and _settled(latencies)
        if settled or seconds >= config.warmup_seconds:
            return Warmup(len(latencies), seconds, settled)


def _settled(latencies: list[int]) -> bool:
    if len(latencies) < 2 * WARMUP_WINDOW:
        return False
    recent = float(np.median(latencies[-WARMUP_WINDOW:]))
    earlier = float(np.median(latencies[-2 * WARMUP_WINDOW : -WARMUP_WINDOW]))
    return abs(recent - earlier) <= WARMUP_TOLERANCE * earlier


def _device_loop(runner: Runner, config: BenchmarkConfig, clock: Clock) -> list[float]:
    """Device time of each pass in milliseconds."""
    samples: list[float] = []
    for count, spend in _blocks(config):
        pairs = [(clock.event(), clock.event()) for _ in range(count)]
        clock.synchronize()
        start = clock.now_ns()
        for begin, end in pairs:
            begin.record()
            runner.enqueue()
            end.record()
        clock.synchronize()
        spend(clock.now_ns() - start)
        samples += [begin.elapsed_time(end) for begin, end in pairs]
    return samples


def _host_loop(runner: Runner, config: BenchmarkConfig, clock: Clock) -> tuple[list[float], list[float]]:
    """Host latency and enqueue time of each pass in milliseconds."""
    host_ms: list[float] = []
    enqueue_ms: list[float] = []
    for count, spend in _blocks(config):
        marks = [(0, 0, 0)] * count
        clock.synchronize()
        start = clock.now_ns()
        for i in range(count):
            begin = clock.now_ns()  # the device is idle: the pass before has been waited for
            runner.enqueue()
            launched = clock.now_ns()
            clock.synchronize()
            marks[i] = (begin, launched, clock.now_ns())
        spend(clock.now_ns() - start)
        host_ms += [(end - begin) / 1e6 for begin, _, end in marks]
        enqueue_ms += [(launched - begin) / 1e6 for begin, launched, _ in marks]
    return host_ms, enqueue_ms


def _blocks(config: BenchmarkConfig) -> Iterator[tuple[int, Callable[[int], None]]]:
    """Numbers of passes to time, until both ``min_iterations`` and ``min_seconds`` are reached (trtexec's rule).

    Each comes with the function that is to be told how many nanoseconds they took.
    """
    spent: list[int] = []
    done, count = 0, config.min_iterations
    most = max(MAX_ITERATIONS, config.min_iterations)
    while count > 0:
        yield count, spent.append
        done += count
        seconds = sum(spent) / 1e9
        if seconds >= config.min_seconds:
            return
        wanted = math.ceil(1.1 * done * (config.min_seconds - seconds) / seconds) if seconds > 0 else most
        count = min(wanted, most - done)


@contextmanager
def _steady(runner: Runner) -> Iterator[None]:
    """Raises :class:`RunError` ("unsteady") when anything but passes happened inside."""
    before = _fingerprint(runner)
    yield
    after = _fingerprint(runner)
    changes = [f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
    if changes:
        raise RunError("unsteady", f"timed passes did more than run: {', '.join(changes)}; the numbers are void")


def _fingerprint(runner: Runner) -> dict[str, int]:
    import torch

    counts = {"generation of the runner": runner.generation, "graphs compiled by torch": 0}
    if "torch._dynamo" in sys.modules:  # else torch has compiled nothing
        from torch._dynamo.utils import counters

        counts["graphs compiled by torch"] = counters["stats"]["unique_graphs"]
    if torch.cuda.is_available():
        # A capture, too, takes memory of its own from the device.
        counts["device allocations"] = torch.cuda.memory_stats().get("num_device_alloc", 0)
    return counts


def _memory_section(before: tuple[int, int] | None) -> dict[str, int] | None:
    """Device memory in bytes, of every library and process.

    Neither TensorRT nor PyTorch's allocator gives back memory between passes, so what is held after the
    last one is the peak.
    """
    after = gpu.memory()
    if before is None or after is None:
        return None
    return {"before_bytes": before[0], "peak_bytes": after[0], "total_bytes": after[1]}
