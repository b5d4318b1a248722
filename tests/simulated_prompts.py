"""A runner of prompts on a simulated device, and the timer over it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from simulated import MS, QUIET, Measured, SimulatedClock

from pipeline.config.schema import BenchmarkConfig, BenchmarkShape
from pipeline.measure.prompt import measure
from pipeline.model.text import token_batch


@dataclass
class SimulatedRunner:
    """A pass takes ``launch_ns`` of the host and ``device_ns(i)`` of the device; ``queue`` passes may be waiting."""

    clock: SimulatedClock
    device_ns: Callable[[int], int] = lambda i: 5 * MS
    launch_ns: int = MS // 10
    queue: int = 4
    cuda_graph: bool = False
    generation: int = 0
    stream: None = None
    passes: int = 0
    prepared: list[torch.Tensor] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    collecting: list[bool] = field(default_factory=list)
    on_pass: Callable[[SimulatedRunner], None] = lambda self: None

    def prepare(self, tokens: torch.Tensor) -> None:
        self.prepared.append(tokens)
        self.generation += 1

    def enqueue(self) -> None:
        clock = self.clock
        self.running = [end for end in self.running if end > clock.host_ns]
        if len(self.running) >= self.queue:  # a full queue makes the launch wait
            clock.host_ns = self.running[-self.queue]
        clock.launch(self.launch_ns, self.device_ns(self.passes))
        self.running.append(clock.device_free_ns)
        self.passes += 1
        self.collecting.append(gc.isenabled())
        self.on_pass(self)


def simulated(**settings: object) -> SimulatedRunner:
    return SimulatedRunner(SimulatedClock(), **settings)  # type: ignore[arg-type]


def config(
    *lengths: int, min_iterations: int = 20, min_seconds: float = 0.0, warmup_seconds: float = 2.0
) -> BenchmarkConfig:
    shapes = [BenchmarkShape(1, length) for length in lengths or (2048,)]
    return BenchmarkConfig(
        "prefill",
        shapes,
        min_iterations=min_iterations,
        min_seconds=min_seconds,
        warmup_seconds=warmup_seconds,
    )


def measured(runner: SimulatedRunner, settings: BenchmarkConfig | None = None, **more: object) -> Measured:
    arguments = {"clock": runner.clock, "read_state": lambda: replace(QUIET, at_s=runner.clock.host_ns / 1e9)} | more
    return Measured(measure(runner, settings or config(), prompts, **arguments))  # type: ignore[arg-type]


def prompts(batch: int, length: int) -> torch.Tensor:
    return token_batch(None, 128, batch, length, seed=0)
