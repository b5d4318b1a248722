"""What is reported of each attention call and of each pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallRecord:
    """An attention call of the graph: what its mask was proved to be, and what was done with it."""

    index: int
    name: str
    op: str
    mask: str
    proof: str
    depends_on: tuple[str, ...]
    """The graph inputs that the mask's truth hangs on."""
    conditions: tuple[str, ...]
    """Where they hold, the mask is not needed; if it was dropped, on the word that they do."""
    could_go: bool
    """Whether the mask stays, and would not if somebody asserted the conditions."""
    counterexample: dict[str, Any] | None
    action: str
    reason: str
    unproved: bool
    """The mask was dropped without a proof, as ``strategy.unproven=force`` asks for."""
    looks: int
    """On how many inputs the mask's graph was run to check the proof."""
    disagreement: str
    """Where it was not what was proved; the mask is then kept."""
    native_gqa: bool
    profile: dict[str, tuple[int, int]]
    """Least and most of each size, for which the proof holds."""
    seconds: float


@dataclass(frozen=True)
class PassRecord:
    """What one pass did."""

    name: str
    changed: int
    """Calls or operations."""
    seconds: float
