"""Dataclasses as strict JSON, and back: how reports, and what the engine store keeps of them, are written.

What is not there is written in one way only: every field of a dataclass stands in its JSON, as null where it is None.
A number that is none (NaN, infinite) is null too, since JSON has no word for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Made = TypeVar("Made")


def to_json(value: Any) -> Any:
    """``value`` as strict JSON takes it: dataclasses are objects, tuples lists, keys text, NaN and infinities null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_json(kind: type[Made], content: Mapping[str, Any]) -> Made:
    """The dataclass ``kind`` whose :func:`to_json` is ``content``; raises :class:`TypeError` for what is none."""
    made: Made = _read(kind, content)
    return made


def _read(kind: Any, value: Any) -> Any:
    if value is None:
        return None
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (kind,) = (each for each in arguments if each is not NoneType)
        return _read(kind, value)
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(**{name: _read(hints.get(name), item) for name, item in value.items()})
    if origin is tuple and arguments[-1] is not Ellipsis:
        return tuple(_read(each, item) for each, item in zip(arguments, value, strict=True))
    if origin is tuple:
        return tuple(_read(arguments[0], item) for item in value)
    if origin is dict:
        return {key: _read(arguments[1], item) for key, item in value.items()}
    return value
