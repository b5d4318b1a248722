"""A device and a host in simulated time, so that the bookkeeping of timers is tested to the nanosecond."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from pipeline.host.gpu import GpuState
from pipeline.host.plain_json import to_json
from pipeline.measure.until_settled import BenchmarkResult

MS = 1_000_000  # ns
QUIET = GpuState(at_s=0.0, throttle_reasons=(), foreign_processes=0)


class Measured:
    """A measurement as it stands in report.json and samples.json."""

    def __init__(self, result: BenchmarkResult) -> None:
        self.report: dict[str, Any] = to_json(result.benchmark)
        self.samples = result.samples


@dataclass
class SimulatedEvent:
    clock: SimulatedClock
    at_ns: int | None = None

    def record(self) -> None:
        self.at_ns = max(self.clock.host_ns, self.clock.device_free_ns)

    def elapsed_time(self, end: SimulatedEvent) -> float:
        assert self.at_ns is not None and end.at_ns is not None, "an event was read that never was recorded"
        return (end.at_ns - self.at_ns) / 1e6


@dataclass
class SimulatedClock:
    """A host that launches work and a device that does it in order."""

    host_ns: int = 0
    device_free_ns: int = 0

    def now_ns(self) -> int:
        return self.host_ns

    def event(self) -> SimulatedEvent:
        return SimulatedEvent(self)

    def launch(self, launch_ns: int, device_ns: int) -> None:
        """The host is busy for ``launch_ns``; the device begins as soon as it is free, and does not end before that."""
        begin = max(self.host_ns, self.device_free_ns)
        self.host_ns += launch_ns
        self.device_free_ns = max(begin + device_ns, self.host_ns)

    def synchronize(self) -> None:
        self.host_ns = max(self.host_ns, self.device_free_ns)

    def on_stream(self) -> AbstractContextManager[None]:
        return nullcontext()
