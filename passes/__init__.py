"""Attention masks of exported programs: proved, rewritten, and handed to TensorRT's native attention layer.

What is named here is the public API (:mod:`passes.front_door`); it is imported when it is asked for, because torch
takes seconds, and ``passes.errors`` is needed without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from passes.front_door import (
        Classification,
        classify,
        load_torch_tensorrt,
        native_attention,
        register,
        rewrite,
        unregister,
    )
    from passes.graph.rewritten import Rewritten

__all__ = [
    "Classification", "Rewritten", "classify", "load_torch_tensorrt", "native_attention", "register", "rewrite",
    "unregister",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from passes import front_door

    return getattr(front_door, name)
