"""What is said of a setting whose value is none that is allowed."""

from __future__ import annotations

from collections.abc import Iterable

from passes.errors import UserError


def one_of(key: str, value: object, allowed: Iterable[object]) -> None:
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"{key}={value}: allowed are {', '.join(map(str, allowed))}")


def at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise UserError(f"{key}={value}: must be at least {least}")
