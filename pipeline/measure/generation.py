"""Measures whole generations: device time, time to first token, time per output token, host latency, enqueue time.

Generations run freely in one loop, in which the host launches ahead and every pass is marked by events; the device is
idle before each generation, so that host latency and device time are of the same one.  Enqueue time has a loop of its
own, in which the device is idle before each *pass*: with work queued up, a launch would wait for room in the queue.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from passes.errors import RunError
from pipeline.config.schema import BenchmarkConfig
from pipeline.host import gpu
from pipeline.host.memory import collector_paused
from pipeline.measure.attention_kernels import attention_kernels
from pipeline.measure.clock import Clock, CudaClock
from pipeline.measure.roofline import DecoderCost, step_floors_s
from pipeline.measure.sections import (
    Benchmark,
    CacheLength,
    Ceilings,
    DecodeStep,
    Generate,
    GpuStates,
    Kernels,
    Summary,
    Warmup,
)
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
    from torch import Tensor

    from pipeline.generate.protocol import Generator

MAX_GENERATIONS = 200
"""Upper bound, unless ``min_generations`` asks for more: each holds an event for every token."""

WARMUP_WINDOW = 2
"""Generations whose median is compared with that of as many before; a generation averages over its tokens itself."""

STEPPED_GENERATIONS = 3
"""Generations in which the device is waited for after every pass, to time its launch; fewer where one takes long."""


@dataclass
class _Times:
    """Milliseconds, one entry a generation; ``step_ms`` and ``launch_ms`` one for each of its passes, prefill first."""

    host_ms: list[float] = field(default_factory=list)
    step_ms: list[list[float]] = field(default_factory=list)
    launch_ms: list[list[float]] = field(default_factory=list)


def measure_generation(
    generator: Generator,
    config: BenchmarkConfig,
    tokens: Tensor,
    cached: bool,
    cost: DecoderCost | None = None,
    ceilings: Ceilings | None = None,
    precision: str = "fp16",
    clock: Clock | None = None,
    read_state: Callable[[], gpu.GpuState] = gpu.read_state,
) -> BenchmarkResult:
    """Measure generations of ``config.generate.output_length`` tokens after the prompts ``tokens`` [batch, length].

    ``cached`` says whether a step reads a cache or runs the whole prefix again, which decides its floor.
    Raises :class:`RunError`: ``out_of_memory``, ``unsteady`` as :func:`pipeline.measure.prompt.measure` does, and
    ``tokens`` when not as many came out as were asked for.
    """
    import torch

    assert config.generate is not None
    shape = config.generate
    if clock is None:
        assert generator.stream is not None  # only on a GPU is anything timed
        clock = CudaClock(generator.stream)
    wanted = (shape.batch, shape.output_length)
    memory_before, free = gpu.memory(), gpu.free_bytes()
    try:
        gc.collect()
        with clock.on_stream(), collector_paused():
            generator.prepare(tokens, shape.output_length)
            warmup = warm_up(
                lambda: _generate(generator, shape.output_length),
                clock,
                WARMUP_WINDOW,
                config.warmup_seconds,
                least=2 * WARMUP_WINDOW,
            )
            before = read_state()
            with steady(generator):
                times = _Times()
                _free_loop(generator, config, clock, times)
                _stepped_loop(generator, config, clock, times)
            after = read_state()
            chosen = tuple(generator.tokens().shape)
            kernels = Kernels(
                prefill=tuple(attention_kernels(generator.prefill)), decode=tuple(attention_kernels(generator.decode))
            )
    except torch.OutOfMemoryError as error:
        raise gpu.out_of_memory(error, free) from error
    if chosen != wanted:
        raise RunError("tokens", f"a generation of {wanted} tokens (batch, new) left {chosen}; the numbers are void")
    floors_s = None
    if cost is not None and ceilings is not None:
        rates = (ceilings.copy_gb_per_s, ceilings.matmul_tflops[precision])
        floors_s = step_floors_s(cost, shape.batch, shape.input_length, shape.output_length, cached, *rates)
    states = GpuStates(before, after)
    whole, step, samples = _entries(config, times, floors_s, warmup, states, generator.cuda_graph)
    made = Benchmark(
        generate=whole, decode=step, kernels=kernels, ceilings=ceilings, memory=memory_section(memory_before)
    )
    return BenchmarkResult(made, samples)


def _generate(generator: Generator, output_length: int) -> None:
    generator.prefill()
    for _ in range(output_length - 1):
        generator.decode()


def _free_loop(generator: Generator, config: BenchmarkConfig, clock: Clock, times: _Times) -> None:
    """Whole generations; an event before the prefill and after every pass."""
    assert config.generate is not None
    passes = config.generate.output_length
    most = max(MAX_GENERATIONS, config.min_generations)
    for count, spend in blocks(config.min_generations, config.min_seconds, most):
        events = [[clock.event() for _ in range(passes + 1)] for _ in range(count)]
        marks = [(0, 0)] * count
        clock.synchronize()
        start = clock.now_ns()
        for i, (first, *others) in enumerate(events):
            begin = clock.now_ns()  # the device is idle: the generation before has been waited for
            first.record()
            step = generator.prefill
            for event in others:
                step()
                event.record()
                step = generator.decode
            clock.synchronize()
            marks[i] = (begin, clock.now_ns())
        spend(clock.now_ns() - start)
        times.host_ms += [(end - begin) / 1e6 for begin, end in marks]
        times.step_ms += [[a.elapsed_time(b) for a, b in pairwise(row)] for row in events]


def _stepped_loop(generator: Generator, config: BenchmarkConfig, clock: Clock, times: _Times) -> None:
    """The launch of every pass, with the device idle before it."""
    assert config.generate is not None
    passes = config.generate.output_length
    for count, spend in blocks(1, config.min_seconds, STEPPED_GENERATIONS):
        start = clock.now_ns()
        for _ in range(count):
            launches = [0] * passes
            step = generator.prefill
            for i in range(passes):
                clock.synchronize()
                begin = clock.now_ns()
                step()
                launches[i] = clock.now_ns() - begin
                step = generator.decode
            clock.synchronize()
            times.launch_ms.append([launch / 1e6 for launch in launches])
        spend(clock.now_ns() - start)


def _entries(
    config: BenchmarkConfig,
    times: _Times,
    floors_s: list[float] | None,
    warmup: Warmup,
    states: GpuStates,
    cuda_graph: bool,
) -> tuple[Generate, DecodeStep, dict[str, dict[str, list[float]]]]:
    """The report's ``generate`` and ``decode``, and the samples that they summarise."""
    assert config.generate is not None
    shape = config.generate
    steps = np.asarray(times.step_ms)  # [generations, passes]
    whole = {
        "device_ms": steps.sum(axis=1).tolist(),
        "host_ms": times.host_ms,
        "enqueue_ms": [sum(row) for row in times.launch_ms],
        "ttft_ms": steps[:, 0].tolist(),
        "tpot_ms": steps[:, 1:].mean(axis=1).tolist(),
    }
    one = {
        "device_ms": steps[:, 1:].ravel().tolist(),
        "enqueue_ms": [launch for row in times.launch_ms for launch in row[1:]],
    }
    drifting = [name for name in ("device_ms", "host_ms") if drifts(whole[name])]
    floor_ms = None if floors_s is None else [1e3 * floor for floor in floors_s]
    summaries = {name: summarise(values) for name, values in whole.items()}
    generate = Generate(
        batch=shape.batch,
        input_length=shape.input_length,
        output_length=shape.output_length,
        **summaries,
        launch_bound=_launch_bound(summaries),
        floor_ms=None if floor_ms is None else sum(floor_ms),
        roofline_fraction=None if floor_ms is None else sum(floor_ms) / summaries["device_ms"].median,
        tokens_per_s=shape.batch * shape.output_length / (summaries["host_ms"].median / 1e3),
        cuda_graph=cuda_graph,
        drift=bool(drifting),
        tainted=tuple(conditions(states.before, states.after, warmup, config.warmup_seconds, drifting)),
        warmup=warmup,
        gpu=states,
    )
    of_steps = {name: summarise(values) for name, values in one.items()}
    step_ms, floor = of_steps["device_ms"].median, None if floor_ms is None else float(np.mean(floor_ms[1:]))
    decode = DecodeStep(
        batch=shape.batch,
        cache_length=CacheLength(shape.input_length + 1, shape.input_length + shape.output_length - 1),
        **of_steps,
        launch_bound=_launch_bound(of_steps),
        floor_ms=floor,
        roofline_fraction=None if floor is None else floor / step_ms,
        tokens_per_s=shape.batch / (step_ms / 1e3),
        cuda_graph=cuda_graph,
    )
    samples = {"generate": whole | {"step_ms": np.median(steps[:, 1:], axis=0).tolist()}, "decode": one}
    return generate, decode, samples


def _launch_bound(summaries: dict[str, Summary]) -> bool:
    return summaries["enqueue_ms"].median > LAUNCH_BOUND * summaries["device_ms"].median
