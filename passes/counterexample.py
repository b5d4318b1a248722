"""Inputs on which a mask is not causal, found by the solver and confirmed by running the mask's graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Counterexample:
    """One element of a mask that differs from the causal mask, on concrete inputs."""

    batch: int
    head: int
    query: int
    key: int
    attends: bool
    """What the mask says there; the causal mask (key <= query) says the opposite."""
    sizes: dict[str, int]
    """The shape symbols' values."""
    inputs: dict[str, Any]
    """The run-time inputs that the mask reads, as nested lists."""
