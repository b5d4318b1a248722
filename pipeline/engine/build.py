"""The ``build`` stage: a TensorRT network becomes the bytes of an engine."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from passes.errors import RunError
from passes.tensorrt.versions import Stack, first_error, tensorrt_errors
from pipeline.engine import kernel_cache, profiles
from pipeline.engine.network import Network, target
from pipeline.engine.sections import Engine

Progress = Callable[[str, int, int], bool]
"""(phase, step, steps) -> whether to go on."""


@dataclass(frozen=True)
class Built:
    """An engine: its bytes, and what is in it."""

    data: Any
    """A buffer of the engine's bytes."""
    engine: Engine
    read: frozenset[str]
    """Its inputs: those of the network that an output hangs on; TensorRT drops others."""


def build_engine(
    stack: Stack, network: Network, progress: Progress, timing_cache: Path | None = None, file: str = "engine.trt"
) -> Built:
    """Serialise the network into an engine; raises :class:`RunError` of kind ``build`` with TensorRT's first error.

    ``file``: its name, once it is written.
    ``timing_cache``: file of what TensorRT measured before, see :mod:`pipeline.engine.kernel_cache`.
    """
    interpreter, net = network.interpreter, network.interpreter.ctx.net
    config = network.configure(interpreter)
    with tensorrt_errors() as errors, _signals_held() as held, kernel_cache.measured(config, timing_cache):
        config.progress_monitor = _monitor(stack, lambda *step: not held and progress(*step))
        data = interpreter.builder.build_serialized_network(net, config)
    if data is None:
        first = first_error(errors)
        kind = "out_of_memory" if "OutOfMemory" in first else "build"
        raise RunError(kind, first)
    engine = replace(
        network.contents,
        file=file,
        bytes=data.nbytes,
        sha256=hashlib.sha256(data).hexdigest(),
        target=target(config),
        profiles=tuple(profiles.lengths(net, profile) for profile in interpreter.optimization_profiles or ()),
    )
    return Built(data, engine, _read(net))


def _read(net: Any) -> frozenset[str]:
    """The inputs of the network ``net`` that an output hangs on."""
    wanted = {net.get_output(i).name for i in range(net.num_outputs)}
    for layer in (net.get_layer(i) for i in reversed(range(net.num_layers))):  # each stands behind what it reads
        if any(layer.get_output(i).name in wanted for i in range(layer.num_outputs)):
            given = (layer.get_input(i) for i in range(layer.num_inputs))
            wanted |= {tensor.name for tensor in given if tensor is not None}
    return frozenset(net.get_input(i).name for i in range(net.num_inputs)) & wanted


@contextmanager
def _signals_held() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are noted in the list, and raised when the block ends.

    TensorRT swallows an exception that is raised in its progress monitor; a monitor that answers False stops it.
    """
    held: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers, or needs to
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield held
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def _monitor(stack: Stack, progress: Progress) -> Any:
    class Monitor(stack.trt.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress(phase_name, step + 1, self.steps.get(phase_name, step + 1))

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()
