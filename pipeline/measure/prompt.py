"""Measures one forward pass over a whole prompt (prefill): device time, host latency, enqueue time.

Device time has a loop of its own, in which passes follow each other without a wait, so that it is the
device's.  Host latency and enqueue time share the other, in which the device is idle before each pass:
with work queued up, a launch would wait for room in the queue and enqueue time would be the device's again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from pipeline.config.schema import BenchmarkConfig
from pipeline.host import gpu
from pipeline.host.memory import collector_paused
from pipeline.measure.clock import Clock, CudaClock
from pipeline.measure.roofline import DecoderCost, prefill_floor_s
from pipeline.measure.sections import Benchmark, Ceilings, GpuStates, Prefill
from pipeline.measure.statistics import drifts, summarise
from pipeline.measure.until_settled import (
    LAUNCH_BOUND,
    BenchmarkResult,
    blocks,
    conditions,
    memory_section,
    steady,
    warm_up,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_ITERATIONS = 20_000
"""Upper bound of a loop, unless ``min_iterations`` asks for more: events and samples are held in memory."""

WARMUP_WINDOW = 10


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

    def prepare(self, tokens: Tensor) -> None:
        """Allocate inputs and outputs for prompts of exactly the shape of ``tokens`` [batch, length] int64, and bind
        them; the inputs hold ``tokens``, without padding."""

    def enqueue(self) -> None:
        """Launch one forward pass on the current stream; wait for nothing and allocate nothing."""


def measure(
    runner: Runner,
    config: BenchmarkConfig,
    tokens: Callable[[int, int], Tensor],
    cost: DecoderCost | None = None,
    ceilings: Ceilings | None = None,
    precision: str = "fp16",
    clock: Clock | None = None,
    read_state: Callable[[], gpu.GpuState] = gpu.read_state,
) -> BenchmarkResult:
    """Measure every shape of ``config``; the first is the headline.

    ``tokens`` gives the prompts [batch, length] int64 that a shape is timed on.  ``cost`` and ``ceilings``
    (:func:`pipeline.measure.ceilings.measure` at ``precision``) give the roofline fraction, which is None without them.
    Raises :class:`RunError`: ``out_of_memory``, or ``unsteady`` when something was compiled, captured, bound or
    allocated while passes were timed.
    """
    clock = clock or CudaClock(runner.stream)
    memory_before = gpu.memory()
    entries: list[Prefill] = []
    samples: dict[str, dict[str, list[float]]] = {}
    for shape in config.shapes:
        floor_s = None
        if cost is not None and ceilings is not None:
            floor_s = prefill_floor_s(
                cost, shape.batch, shape.input_length, ceilings.copy_gb_per_s, ceilings.matmul_tflops[precision]
            )
        prompts, floor_ms = tokens(shape.batch, shape.input_length), None if floor_s is None else floor_s * 1e3
        entry, times = _measure_shape(runner, config, prompts, clock, read_state, floor_ms)
        samples[f"prefill_{shape.batch}x{shape.input_length}" if entries else "prefill"] = times
        entries.append(entry)
    made = Benchmark(
        prefill=entries[0] if entries else None,
        prefill_shapes=tuple(entries[1:]),
        ceilings=ceilings,
        memory=memory_section(memory_before),
    )
    return BenchmarkResult(made, samples)


def _measure_shape(
    runner: Runner,
    config: BenchmarkConfig,
    tokens: Tensor,
    clock: Clock,
    read_state: Callable[[], gpu.GpuState],
    floor_ms: float | None,
) -> tuple[Prefill, dict[str, list[float]]]:
    import torch

    batch, length = tokens.shape
    free = gpu.free_bytes()
    try:
        gc.collect()
        with clock.on_stream(), collector_paused():
            runner.prepare(tokens)
            warmup = warm_up(runner.enqueue, clock, WARMUP_WINDOW, config.warmup_seconds)
            before = read_state()
            with steady(runner):
                device = _device_loop(runner, config, clock)
                host, enqueue = _host_loop(runner, config, clock)
            after = read_state()
    except torch.OutOfMemoryError as error:
        raise gpu.out_of_memory(error, free) from error
    times = {"device_ms": device, "host_ms": host, "enqueue_ms": enqueue}
    summaries = {name: summarise(values) for name, values in times.items()}
    drifting = [name for name in ("device_ms", "host_ms") if drifts(times[name])]
    device_ms = summaries["device_ms"].median
    entry = Prefill(
        batch=batch,
        input_length=length,
        **summaries,
        launch_bound=summaries["enqueue_ms"].median > LAUNCH_BOUND * device_ms,
        floor_ms=floor_ms,
        roofline_fraction=None if floor_ms is None else floor_ms / device_ms,
        tokens_per_s=batch * length / (summaries["host_ms"].median / 1e3),
        cuda_graph=runner.cuda_graph,
        drift=bool(drifting),
        tainted=tuple(conditions(before, after, warmup, config.warmup_seconds, drifting)),
        warmup=warmup,
        gpu=GpuStates(before, after),
    )
    return entry, times


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
    return blocks(config.min_iterations, config.min_seconds, max(MAX_ITERATIONS, config.min_iterations))
