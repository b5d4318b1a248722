"""Runs an engine: device buffers, one stream, and where asked for a CUDA graph.

:class:`Engine` is what the verification calls, what the benchmark measures and what
:func:`pipeline.tracking.engines.load_engine` gives back from MLflow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passes.errors import UserError
from passes.tensorrt.versions import Stack, load_stack
from pipeline.engine import guard
from pipeline.engine.file import check_target, read_engine
from pipeline.engine.session import Session, captured
from pipeline.trace.call_form import InputSpec, make_inputs


class Engine:
    """An engine on the current CUDA device.  Inputs int64 [batch, length]; output logits [batch, 1 or length, V].

    ``conditions``: what every call checks of its inputs first, see :mod:`pipeline.engine.guard`.
    ``runtime_cache``: file of the kernels that were compiled before, see :meth:`Session.keep_kernels`.
    """

    def __init__(
        self,
        stack: Stack,
        data: Any,
        inputs: tuple[InputSpec, ...],
        cuda_graph: bool = False,
        conditions: tuple[str, ...] = (),
        runtime_cache: Path | None = None,
    ) -> None:
        self.inputs = inputs
        self.cuda_graph = cuda_graph
        self.conditions = conditions
        self.generation = 0
        self.stream = torch.cuda.Stream()
        self.session = Session(stack, data, runtime_cache)
        self.keep_kernels = self.session.keep_kernels
        (self._output,) = self.session.outputs
        self._buffers: dict[str, Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None

    def prepare(self, tokens: Tensor) -> None:
        """Allocate and bind everything for ``tokens`` [batch, length] int64, which the inputs hold without padding."""
        self._bind(make_inputs([spec.name for spec in self.inputs], tokens))

    def _bind(self, inputs: dict[str, Tensor]) -> None:
        self.generation += 1
        self._graph = None
        self._buffers = {}
        shapes = {spec.name: tuple(inputs[spec.name].shape) for spec in self.inputs}
        if not self.session.fit(shapes):
            first = self.inputs[0]
            raise UserError(
                f"{first.name} {shapes[first.name]}: outside the engine's profile, "
                f"batch {first.batch} and length {first.min}..{first.max}"
            )
        for name in shapes:
            self._buffers[name] = inputs[name].to(device="cuda", dtype=torch.int64).contiguous().clone()
        # Poisoned: an element that the engine does not write is seen as NaN.
        shape, dtype = self.session.shape(self._output), self.session.dtype(self._output)
        self._buffers[self._output] = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
        self.session.bind(self._buffers)
        torch.cuda.current_stream().synchronize()
        self._execute()  # the first pass at a shape compiles kernels
        self.stream.synchronize()
        if self.cuda_graph:
            self._graph = captured(self.stream, self._execute)

    def _execute(self) -> None:
        self.session.run(self.stream)

    def enqueue(self) -> None:
        """Launch one forward pass over the bound buffers; waits for nothing."""
        if self._graph is None:
            self._execute()
        else:
            self._graph.replay()

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits [batch, 1 or length, vocabulary] for ``inputs``, each [batch, length] int64.

        Raises :class:`RunError` of kind ``assumption``, and runs nothing, where they break one of the conditions.
        """
        guard.check(self.conditions, inputs)
        return self.unguarded(inputs)

    def unguarded(self, inputs: dict[str, Tensor]) -> Tensor:
        """The same without the check: what the verification calls, to see what breaking a condition costs."""
        bound = self._buffers.get(self.inputs[0].name)
        if bound is None or bound.shape != inputs[self.inputs[0].name].shape:
            self._bind(inputs)
        for spec in self.inputs:
            self._buffers[spec.name].copy_(inputs[spec.name])
        self._buffers[self._output].fill_(float("nan"))
        torch.cuda.current_stream().synchronize()
        with torch.cuda.stream(self.stream):
            self.enqueue()
        self.stream.synchronize()
        return self._buffers[self._output].clone()


def open_engine(path: Path, cuda_graph: bool = False, runtime_cache: Path | None = None) -> Engine:
    """The engine file ``path`` with the manifest beside it; raises :class:`UserError` if its hash is another."""
    manifest, data = read_engine(path)
    conditions = guard.guarded(manifest)
    if manifest.get("cache"):
        raise UserError(f"{path.name}: fills a KV cache; it generates together with decode.trt (open_generator)")
    check_target(path, manifest)
    inputs = tuple(map(InputSpec.of, manifest["inputs"]))
    return Engine(load_stack(), data, inputs, cuda_graph, conditions, runtime_cache)
