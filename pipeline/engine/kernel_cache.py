"""What TensorRT found out on this GPU, kept for the next process.

TensorRT-RTX compiles an engine's kernels when they are first needed and keeps them in an ``IRuntimeCache``; TensorRT
measures candidates while it builds and keeps the times in an ``ITimingCache`` (TensorRT-RTX, which measures nothing,
has that class too, but its operations do nothing).  Both check by themselves that the bytes are of this GPU and
version and start empty where they are not, so a file that does not fit costs time, never correctness.

Which forms of attention have fused kernels is kept as well, in files that are named by GPU and versions.

Not yet seen on a GPU: without one TensorRT-RTX loads no engine, and with it comes the runtime cache; the timing cache
has been made and serialised, by TensorRT-RTX's empty version of it only.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from passes.tensorrt.fused_kernels import FusedKernels
from pipeline.host.files import draft

_log = logging.getLogger(__name__)


def use_runtime_cache(runtime_config: Any, path: Path, cache: Any = None) -> Any:
    """Give ``runtime_config``, an ``IRuntimeConfig``, the runtime ``cache``; None: one with the kernels of ``path``, if
    it is there.

    To be called before the execution context is created.  Returns the ``IRuntimeCache``, for :func:`save`.
    """
    if cache is None:
        cache = runtime_config.create_runtime_cache()
        if path.is_file():
            cache.deserialize(path.read_bytes())  # False, and empty, where it is of another GPU or version
    runtime_config.set_runtime_cache(cache)
    return cache


@contextmanager
def measured(builder_config: Any, path: Path | None) -> Iterator[None]:
    """For one build: ``builder_config``, an ``IBuilderConfig``, knows the times of ``path``, if it is there, and what
    is measured in the block is written to it afterwards.  None: nothing is known and nothing kept."""
    if path is None:
        yield
        return
    cache = builder_config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    cache = cache or builder_config.create_timing_cache(b"")  # None for bytes that are no timing cache
    builder_config.set_timing_cache(cache, False)  # False: one of another GPU is refused
    yield
    save(cache, path)


@contextmanager
def fused_kernels(path: Path | None) -> Iterator[FusedKernels]:
    """What is known of TensorRT's fused attention kernels: by the answers in ``path``, if they are there, to which new
    ones are added when the block ends.  None: nothing is known and nothing kept."""
    known = FusedKernels(None if path is None else _answers(path))
    before = dict(known.answers)
    try:
        yield known
    finally:
        if path is not None and known.answers != before:
            _write(json.dumps(known.answers, indent=1).encode(), path)


def _answers(path: Path) -> dict[str, str | None]:
    """None at all where the file is not there, or no such file: it is asked again, which takes no second."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    good = isinstance(found, dict) and all(each is None or isinstance(each, str) for each in found.values())
    return found if good else {}


def save(cache: Any, path: Path) -> None:
    """Write ``cache`` to ``path``, whole or not at all; nothing where its folder has left the store meanwhile."""
    data = cache.serialize()
    if data is not None and data.nbytes > 0:
        _write(data, path)


def _write(data: Any, path: Path) -> None:
    if not path.parent.is_dir():
        return
    try:
        with draft(path) as part:
            part.write_bytes(data)
    except FileNotFoundError:  # it left in this moment
        return
    except OSError as error:  # the next run compiles them again
        _log.warning(f"{path}: not kept ({error.strerror})")
