"""The conditions under which a mask was dropped, checked on the inputs before an engine runs.

Outside of them the engine would give wrong logits without a word.  A check reads one input [batch, length] once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from passes.errors import RunError, UserError
from passes.proof.conditions import LARGEST_POSITION
from pipeline.config.choices import ASSUMPTIONS


def _one_more_each(positions: Tensor) -> Tensor:
    """The proof says nothing of a first position below 0 or beyond ``LARGEST_POSITION``."""
    return torch.cat([positions[:, :1].clamp(0, LARGEST_POSITION), positions[:, :-1] + 1], dim=1)


WANTED: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous_positions": _one_more_each,
    "no_padding": torch.ones_like,
}
"""Condition -> what the input that it is about would be, given that input [batch, length]."""


def violation(conditions: Collection[str], inputs: dict[str, Tensor]) -> str | None:
    """The first place where ``inputs``, each [batch, length], break one of the ``conditions``, in one line."""
    for condition in conditions:
        name = ASSUMPTIONS[condition]
        found, wanted = inputs[name], WANTED[condition](inputs[name])
        broken = (found != wanted).nonzero()
        if len(broken):
            row, token = broken[0].tolist()
            return (
                f"{name} is {int(found[row, token])} at row {row}, token {token}, where {condition} asks for "
                f"{int(wanted[row, token])}"
            )
    return None


def check(conditions: Collection[str], inputs: dict[str, Tensor]) -> None:
    """Raises :class:`RunError` of kind ``assumption`` where ``inputs`` break one of the ``conditions``."""
    if broken := violation(conditions, inputs):
        raise RunError("assumption", f"{broken}; the engine was built with strategy.assume=[{','.join(conditions)}]")


def guarded(manifest: dict[str, Any]) -> tuple[str, ...]:
    """The conditions that the engine of that ``manifest`` checks; raises :class:`UserError` for one unknown here."""
    conditions = tuple(manifest.get("assumed", ())) if manifest.get("guard", True) else ()
    for condition in conditions:
        if condition not in WANTED:
            raise UserError(f"engine.json: assumed={condition} cannot be checked; known are {', '.join(WANTED)}")
    return conditions
