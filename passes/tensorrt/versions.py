"""The one place that imports Torch-TensorRT and TensorRT.

Two flavours share the import names: ``torch-tensorrt`` (TensorRT) and ``torch-tensorrt-rtx``
(TensorRT-RTX, aliased to ``tensorrt`` by Torch-TensorRT itself).  Neither is imported before a stage
needs it, and both can be imported, and can build engines, on a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from passes.errors import UserError, message_line
from passes.private import of_torch_tensorrt


@dataclass(frozen=True)
class Stack:
    """The imported libraries."""

    trt: ModuleType
    torch_tensorrt: ModuleType
    flavour: str
    """``tensorrt`` or ``tensorrt_rtx``."""

    @property
    def replays_itself(self) -> bool:
        """An execution context can capture and replay a CUDA graph of its own: TensorRT-RTX."""
        return self.flavour == "tensorrt_rtx"

    def versions(self) -> dict[str, str]:
        return {
            "torch": torch.__version__,
            "torch_tensorrt": self.torch_tensorrt.__version__,
            "tensorrt": self.trt.__version__,
            "flavour": self.flavour,
        }


@contextlib.contextmanager
def device_stood_in() -> Iterator[None]:
    """Torch-TensorRT asks for the current device while it is being imported, and while it describes an engine; answer
    where there is none, and hold back its library's complaint, which goes to the file descriptor of stderr."""
    if torch.cuda.is_available():
        yield
        return
    properties = SimpleNamespace(major=8, minor=0, name="none")
    answers: dict[str, Callable[..., Any]] = {
        "get_device_capability": lambda *_: (properties.major, properties.minor),
        "get_device_properties": lambda *_: properties,
        "current_device": lambda: 0,
    }
    with contextlib.ExitStack() as back, stderr_held():
        for name, answer in answers.items():
            back.callback(setattr, torch.cuda, name, getattr(torch.cuda, name))
            setattr(torch.cuda, name, answer)
        yield


@contextlib.contextmanager
def stderr_held() -> Iterator[None]:
    """What libraries write to the file descriptor of stderr while the block runs, past every logger, is dropped."""
    with contextlib.ExitStack() as back, Path(os.devnull).open("w") as nothing:
        kept = os.dup(2)
        back.callback(os.close, kept)
        back.callback(os.dup2, kept, 2)
        os.dup2(nothing.fileno(), 2)
        yield


@functools.cache
def load_stack() -> Stack:
    """Import Torch-TensorRT once; raises :class:`UserError` where it is not installed."""
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise UserError(
            "backend=tensorrt: Torch-TensorRT is not installed; pip install 'proved-attention[rtx]' "
            "(or [tensorrt], with NVIDIA's package index)"
        )
    with quiet(), device_stood_in():
        if importlib.util.find_spec("tensorrt_rtx_libs") is not None:
            # An unpacked tree of TensorRT-RTX: this loads its shared libraries, which must come first.
            importlib.import_module("tensorrt_rtx_libs")
        torch_tensorrt = importlib.import_module("torch_tensorrt")
        trt = importlib.import_module("tensorrt")
    flavour = "tensorrt_rtx" if torch_tensorrt.ENABLED_FEATURES.tensorrt_rtx else "tensorrt"
    return Stack(trt, torch_tensorrt, flavour)


@contextlib.contextmanager
def quiet(level: int = logging.ERROR) -> Iterator[None]:
    """Hold back the libraries' Python warnings and log records up to ``level`` while the block runs."""
    previous = logging.root.manager.disable
    logging.disable(max(previous, level))  # what somebody else holds back stays so
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


HARMLESS = (
    "Failed attempt to rename a layer",  # Torch-TensorRT gives two constants one name
    "CUDA driver version is insufficient",  # of a builder without a GPU, which goes on
)


def first_error(messages: Sequence[str]) -> str:
    """Of what :func:`tensorrt_errors` collected, in a line."""
    return message_line(messages[0]) if messages else "TensorRT gave no reason"


@contextlib.contextmanager
def tensorrt_errors() -> Iterator[list[str]]:
    """Collects the errors that TensorRT logs through Torch-TensorRT's logger, instead of printing them, inside of
    :func:`quiet` too; without the ``HARMLESS`` ones."""
    messages: list[str] = []

    def collect(message: str) -> None:
        if not any(known in message for known in HARMLESS):
            messages.append(message)

    with of_torch_tensorrt.errors_go_to(collect):
        yield messages
