"""What runs one program over tensors that are bound to it by name: a TensorRT engine, or the graph it is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from passes.errors import RunError, UserError, message_line
from passes.tensorrt.versions import Stack, first_error, tensorrt_errors
from pipeline.engine import kernel_cache, profiles
from pipeline.host import gpu


@dataclass(frozen=True)
class Held:
    """Device memory of engines in bytes, beside that of their weights."""

    cache_bytes: int
    activation_bytes: int


class Runs(Protocol):
    """A program; its inputs carry the names that it was traced with, its outputs ``output0``, ``output1`` ..."""

    @property
    def activation_bytes(self) -> int:
        """What it holds on the device to run, beside its weights and what is bound to it."""

    def bind(self, tensors: dict[str, Tensor]) -> None:
        """Read from and write to ``tensors`` from now on."""

    def run(self, stream: torch.cuda.Stream | None) -> None:
        """Launch it once; waits for nothing."""

    def capturable(self, stream: torch.cuda.Stream) -> bool:
        """Whether :meth:`run` can be captured in a CUDA graph as it is bound now."""

    def replay_itself(self) -> bool:
        """Let :meth:`run` capture and replay a CUDA graph of its own from now on; False where it cannot."""

    def keep_kernels(self) -> None:
        """Write what was compiled for it to where it is kept, if it is."""


def captured(stream: torch.cuda.Stream | None, launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What ``launch`` launches as a CUDA graph; raises :class:`RunError` of kind ``cuda_graph`` where it cannot be."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            launch()
    except RuntimeError as error:
        raise RunError("cuda_graph", f"the engine cannot be captured: {message_line(error)}") from error
    return graph


class Session:
    """A TensorRT engine on the current CUDA device, with an execution context for each optimization profile it runs by.

    ``runtime_cache``: file of the kernels that were compiled before, see :meth:`keep_kernels`.
    ``specialise``: TensorRT-RTX compiles kernels for every new length; without, one set serves them all.
    """

    def __init__(
        self, stack: Stack, data: Any, runtime_cache: Path | None = None, engine: Any = None, specialise: bool = True
    ) -> None:
        self._stack, self._specialise, self._replays = stack, specialise, False
        self._runtime_cache_file, self._runtime_cache = runtime_cache, None
        self._runtime = stack.trt.Runtime(stack.torch_tensorrt.logging.TRT_LOGGER)
        self._engine = engine or _loaded(self._runtime, data)
        self._contexts: dict[int, Any] = {}
        self._configs: list[Any] = []
        self._context = self._context_of(0)
        # Without the inputs that nothing reads any more, such as an attention mask that was assumed to be all ones.
        self.names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in self.names}
        self.outputs = [name for name in self.names if modes[name] == stack.trt.TensorIOMode.OUTPUT]
        self._dynamic = [
            name for name in self.names if name not in self.outputs and -1 in tuple(self._engine.get_tensor_shape(name))
        ]
        self._exact = profiles.exact(self._engine, self._dynamic)
        self._bound: dict[str, Tensor] = {}
        self._addresses: dict[str, int] = {}

    def _context_of(self, profile: int) -> Any:
        if profile not in self._contexts:
            context = self._make_context()
            if profile:
                stream = torch.cuda.Stream()
                if not context.set_optimization_profile_async(profile, stream.cuda_stream):
                    raise RunError("execute", f"TensorRT could not choose optimization profile {profile}")
                stream.synchronize()
            self._contexts[profile] = context
        return self._contexts[profile]

    def _make_context(self) -> Any:
        if self._stack.flavour != "tensorrt_rtx":
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        # Kernels for a new length are compiled when it is first met, before it runs, not behind the caller's back.
        strategies = self._stack.trt.DynamicShapesKernelSpecializationStrategy
        chosen = strategies.EAGER if self._specialise else strategies.NONE
        config.dynamic_shapes_kernel_specialization_strategy = chosen
        if self._replays:
            config.cuda_graph_strategy = self._stack.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if self._runtime_cache_file is not None:
            self._runtime_cache = kernel_cache.use_runtime_cache(config, self._runtime_cache_file, self._runtime_cache)
        self._configs.append(config)  # TensorRT-RTX 1.4 reads it when a profile is chosen, and does not keep it alive
        return self._engine.create_execution_context(config)

    def capturable(self, stream: torch.cuda.Stream) -> bool:
        return not self._stack.replays_itself or bool(self._context.is_stream_capturable(stream.cuda_stream))

    def replay_itself(self) -> bool:
        if not self._stack.replays_itself:
            return False
        self._replays, self._contexts = True, {}
        self._context = self._context_of(0)
        self.bind(self._bound)
        return True

    def twin(self, specialise: bool = True) -> Session:
        """Another context of the same engine: to run it over other tensors without binding anew."""
        return Session(self._stack, None, None, self._engine, specialise)

    @property
    def activation_bytes(self) -> int:
        """See :class:`Runs`: each context has what the largest shapes of all profiles need."""
        return len(self._contexts) * int(self._engine.device_memory_size_v2)

    def keep_kernels(self) -> None:
        """Write the kernels compiled so far to ``runtime_cache``; on TensorRT, which compiles none here, nothing."""
        if self._runtime_cache is not None and self._runtime_cache_file is not None:
            kernel_cache.save(self._runtime_cache, self._runtime_cache_file)

    def fit(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Say how large the inputs are, and so by which optimization profile they run: the one that was made for
        exactly these ``shapes``, else the one for the whole range.  False where they lie outside of that.
        """
        context = self._context_of(self._exact.get(tuple(shapes[name] for name in self._dynamic), 0))
        fits = all(context.set_input_shape(name, shape) for name, shape in shapes.items() if name in self.names)
        if context is not self._context:
            self._context = context
            self._set_addresses()
        return fits

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an output, once every input's shape is set."""
        return tuple(self._context.get_tensor_shape(name))

    def dtype(self, name: str) -> torch.dtype:
        return self._stack.torch_tensorrt.dtype.try_from(self._engine.get_tensor_dtype(name)).to(torch.dtype)

    def bind(self, tensors: dict[str, Tensor]) -> None:
        shapes = {name: tuple(tensors[name].shape) for name in self.names if name not in self.outputs}
        if not self.fit(shapes):
            raise UserError(f"{', '.join(f'{n} {shapes[n]}' for n in self._dynamic)}: outside the engine's profile")
        self._bound = tensors
        self._addresses = {name: tensors[name].data_ptr() for name in self.names}
        self._set_addresses()

    def _set_addresses(self) -> None:
        for name, address in self._addresses.items():
            self._context.set_tensor_address(name, address)

    def run(self, stream: torch.cuda.Stream | None) -> None:
        assert stream is not None
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise RunError("execute", "TensorRT could not run the engine")


def _loaded(runtime: Any, data: Any) -> Any:
    """The engine of ``data``; raises :class:`RunError`, of kind ``out_of_memory`` where there is no room for its
    weights and of kind ``deserialize`` where it is of no use on this GPU."""
    free = gpu.free_bytes()
    with tensorrt_errors() as errors:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is not None:
        return engine
    first, size = first_error(errors), memoryview(data).nbytes
    if (free is not None and free < size) or "OutOfMemory" in first:
        raise gpu.no_room(f"{size / 2**30:.2f} GiB", free)
    raise RunError("deserialize", f"TensorRT cannot load the engine on this GPU: {first}")


class GraphSession:
    """A traced program in PyTorch: what an engine is made from, where none can run."""

    def __init__(
        self,
        graph: Callable[..., Iterable[Tensor]],
        inputs: tuple[str, ...],
        arithmetic: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """``inputs``: the engine's names of its inputs, in order; ``keys_0`` stands in the list ``keys``.
        ``arithmetic``: in which it runs, see :mod:`pipeline.verify.arithmetic`."""
        self._graph, self._arithmetic = graph, arithmetic
        self._inputs = inputs
        self._tensors: dict[str, Tensor] = {}

    def bind(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def activation_bytes(self) -> int:
        return 0  # PyTorch's allocator has them, for as long as it runs

    def capturable(self, stream: torch.cuda.Stream) -> bool:
        return False

    def replay_itself(self) -> bool:
        return False

    def keep_kernels(self) -> None:
        return None  # PyTorch compiles none

    def run(self, stream: torch.cuda.Stream | None) -> None:
        arguments: dict[str, Any] = {}
        for name in self._inputs:
            group, _, number = name.rpartition("_")
            if number.isdigit():
                arguments.setdefault(group, []).append(self._tensors[name])
            else:
                arguments[name] = self._tensors[name]
        with torch.no_grad(), self._arithmetic():
            for i, value in enumerate(self._graph(**arguments)):
                self._tensors[f"output{i}"].copy_(value)
