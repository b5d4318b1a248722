"""What the garbage collector and the C library do to a run's time and memory."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def collector_paused() -> Iterator[None]:
    """For what is timed, and for stages that make millions of objects and drop few: the garbage collector would walk
    all of them again and again, a quarter of the time that a GGUF file takes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def trim() -> None:
    """Give freed memory back to the system.  glibc keeps what reading a GGUF file, building an engine and comparing
    logits took, most of a gigabyte for SmolLM2, in pieces that the next logits do not fit into."""
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
