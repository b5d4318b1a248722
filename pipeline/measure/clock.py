"""The host's clock and the device's, behind one small interface, so that bookkeeping can be tested without a device."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Event(Protocol):
    """A mark on the device's timeline; ``torch.cuda.Event`` is one."""

    def record(self) -> None: ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this mark to ``end``."""


class Clock(Protocol):
    """The host's clock and the device's."""

    def now_ns(self) -> int: ...

    def event(self) -> Event: ...

    def synchronize(self) -> None:
        """Wait until the stream is idle."""

    def on_stream(self) -> AbstractContextManager[Any]:
        """Makes the measured stream the current one."""


class CudaClock:
    """The real :class:`Clock`, of one CUDA stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def now_ns(self) -> int:
        return time.perf_counter_ns()

    def event(self) -> Event:
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)  # CUDA creates it at its first record: here, not in the timed loop
        return event

    def synchronize(self) -> None:
        self._stream.synchronize()

    def on_stream(self) -> AbstractContextManager[Any]:
        import torch

        return torch.cuda.stream(self._stream)
