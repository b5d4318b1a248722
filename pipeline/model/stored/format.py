"""What a format has to say of itself so that its checkpoints can be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from pipeline.model.stored.grid import Grid

Settings = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Format:
    """How the quantised layers of a checkpoint are stored: as tensors ``LAYER.qweight``, ``LAYER.scales`` …"""

    name: str
    """As the report calls it."""
    values: str
    """The tensor that tells a quantised layer: it has this one, and as no float of 16 bits and more."""
    needed: tuple[str, ...]
    """What each must have beside it."""
    optional: tuple[str, ...]
    """What it may have beside it."""
    read: Callable[[Mapping[str, Tensor]], Grid]
    """The weight of a layer, of its tensors; raises :class:`ValueError` where they are none."""
    unused: tuple[str, ...] = ()
    """What is for arithmetic of fewer bits, which is not done here: scales of rows and of a cache."""
    rounds_rows: bool = False
    """Whether it means rows to be rounded too."""


def one_of(key: str, value: Any, allowed: tuple[T, ...]) -> T:
    """The one of ``allowed`` that ``value`` is; raises :class:`ValueError` where it is none."""
    if value not in allowed:
        raise ValueError(f"{key}={value}, and read are {', '.join(map(str, allowed))}")
    return allowed[allowed.index(value)]


def two_sizes(key: str, value: Any) -> tuple[int, int]:
    """``value`` as the rows and columns of a block; raises :class:`ValueError` where it is no such thing."""
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(n) is int and n > 0 for n in value):
        raise ValueError(f"{key}={value}, and two numbers above 0 are read")
    return value[0], value[1]
