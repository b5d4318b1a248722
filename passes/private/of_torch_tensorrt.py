"""Of Torch-TensorRT: its converters and lowering passes as lists, its builder's settings, its logger, its engines.

To register a converter is public (``torch_tensorrt.dynamo.conversion.dynamo_tensorrt_converter``); to take one out
again is not, and neither is the list of lowering passes.  Every function here wants it to be imported already
(:func:`passes.tensorrt.versions.load_stack`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from passes.private.part import attribute, part


def converters() -> dict[Any, Any]:
    """Operation -> what is registered for it, in the order in which it is asked: objects with a
    ``converter_implementation``."""
    found: dict[Any, Any] = part("torch_tensorrt.dynamo.conversion:DYNAMO_ATEN_CONVERTERS")
    return found


def lowering_passes() -> list[Any]:
    """Functions of (graph module, settings), in the order in which they run."""
    found: list[Any] = part("torch_tensorrt.dynamo.lowering:ATEN_POST_LOWERING_PASSES.passes")
    return found


def builder_config(interpreter: Any) -> Any:
    """TensorRT's builder configuration with the settings and the optimization profiles of ``interpreter``."""
    return part("torch_tensorrt.dynamo.conversion:TRTInterpreter._populate_trt_builder_config")(interpreter)


@contextmanager
def left_unfolded(operation: Any) -> Iterator[None]:
    """Calls of ``operation`` on constants stay calls while the block lowers a graph."""
    rules = "torch_tensorrt.dynamo.lowering.constant_fold_exclusions:{}_constant_fold_exclusion_rule"
    name = f"leave {operation}"
    part(rules.format("register"))(name)(lambda node: [node] if node.target is operation else [])
    try:
        yield
    finally:
        part(rules.format("unregister"))(name)


@contextmanager
def errors_go_to(take: Callable[[str], None]) -> Iterator[None]:
    """``take`` is called with each error that TensorRT logs while the block runs, in the place of its logger, whether
    or not log records are held back."""
    logger = part("torch_tensorrt.logging:_LOGGER")
    before = logger.error
    logger.error = take
    try:
        yield
    finally:
        logger.error = before


ENGINE = "_run_on_acc_0"
"""What a graph calls its engine's module, so that Torch-TensorRT knows it as one."""


def engine_module(
    data: bytes, inputs: list[str], outputs: list[str], shapes: dict[str, list[dict[str, Any]]], settings: Any
) -> Any:
    """The engine ``data`` as a module for ``torch_tensorrt.save``, in the form in which that writes one: serialised.
    Nothing loads it, which takes the GPU that it was built for.

    ``inputs`` and ``outputs``: the engine's names of them.  ``shapes``: of both, for tracing: ``shape_exprs`` (numbers
    and sympy expressions) and ``dtype``.  ``settings``: with ``lazy_engine_init``.
    """
    kind = part("torch_tensorrt.dynamo.runtime:TorchTensorRTModule")
    module = kind(data, inputs, outputs, name="engine", settings=settings, symbolic_shape_expressions=shapes)
    serialised = part("torch_tensorrt.dynamo.runtime._TRTEngine:EngineSerializer")
    module.engine = serialised(attribute(module, "_pack_engine_info")())
    return module
