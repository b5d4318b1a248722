"""Eager PyTorch and ``torch.compile`` behind the engine's interface, so that rivals are rows of the same sweep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from passes.errors import RunError, message_line
from passes.private.of_torch import compile_error
from pipeline.config.schema import BackendConfig
from pipeline.rivals.kernels import kernels_of
from pipeline.trace.call_form import CallForm, make_inputs


@contextmanager
def torch_compile_errors() -> Iterator[None]:
    """What ``torch.compile`` cannot do as a :class:`RunError` of kind ``torch_compile``."""
    try:
        yield
    except compile_error() as error:
        raise RunError("torch_compile", message_line(error)) from error


class TorchRunner:
    """``form`` on the GPU, eager or compiled at exactly the shape it is called with."""

    cuda_graph = False

    def __init__(self, form: CallForm, names: list[str], backend: BackendConfig) -> None:
        self.names = names
        self.generation = 0
        self.stream = torch.cuda.Stream()
        self._kernels = kernels_of(backend, form.model)
        self._forward = form
        if backend.name == "torch_compile":
            assert backend.mode is not None
            self._forward = torch.compile(form, mode=backend.mode, dynamic=False)  # type: ignore[assignment]
            self.cuda_graph = backend.mode in ("reduce-overhead", "max-autotune")
        self._inputs: dict[str, Tensor] = {}

    def prepare(self, tokens: Tensor) -> None:
        """Inputs for ``tokens`` [batch, length] int64, and one pass, which compiles."""
        self.generation += 1
        self._inputs = make_inputs(self.names, tokens.cuda())
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            self.enqueue()
        self.stream.synchronize()

    def enqueue(self) -> None:
        """Launch one forward pass on the current stream."""
        with torch.no_grad(), self._kernels():
            self._forward(**self._inputs)

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits [batch, 1 or length, vocabulary]."""
        with torch.no_grad(), self._kernels(), torch_compile_errors():
            return self._forward(**{name: tensor.cuda() for name, tensor in inputs.items()}).clone()
