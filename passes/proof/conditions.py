"""Conditions on run-time inputs that a person can assert, of which inputs they speak, and what keeps them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import z3
from torch.fx import Node

from passes.proof.calls import AttentionCall
from passes.proof.symbolic import Evaluator
from passes.proof.terms import INTEGERS, Index, Term, literal

CONDITIONS = {
    "contiguous_positions": "positions rise by one from token to token",
    "no_padding": "the attention mask is all ones",
}
"""Conditions on run-time inputs that a person can assert (``strategy.assume``) and a runtime can check."""
LARGEST_POSITION = 2**31 - 1
"""Assumed of the first position where positions are contiguous: far beyond any context, far below overflow."""
CONDITION_INPUTS = {"contiguous_positions": "position", "no_padding": "attention_mask"}
"""What the inputs are called that a condition is about: Hugging Face's names, as parts of the placeholder's name."""


def about(call: AttentionCall, depends_on: Collection[str]) -> dict[str, list[str]]:
    """Which of the inputs ``depends_on`` each condition is about."""
    assert call.mask is not None
    rows = {node.name for node in call.mask.graph.nodes if node.op == "placeholder" and _is_row(node.meta["val"])}
    return {
        condition: [name for name in depends_on if word in name and name in rows]
        for condition, word in CONDITION_INPUTS.items()
    }


def _is_row(value: Any) -> bool:
    """Whether ``value`` holds one number a token: [length] or [batch, length], and no fractions."""
    return isinstance(value, torch.Tensor) and value.dim() in (1, 2) and value.dtype in (torch.bool, *INTEGERS)


def _contiguous(evaluator: Evaluator, node: Node) -> Callable[[Index], Term]:
    """Each row of ``node`` [..., length] rises by one from a first position of its own."""

    def element(index: Index) -> Term:
        *row, place = index
        function = z3.Function(f"first {node.name}", *[z3.IntSort()] * (len(row) + 1))
        first = function(*row)
        evaluator.premises.append(z3.And(first >= 0, first <= LARGEST_POSITION))
        return first + place

    return element


def _ones(evaluator: Evaluator, node: Node) -> Callable[[Index], Term]:
    return lambda index: literal(1, node.meta["val"].dtype)


GIVEN = {"contiguous_positions": _contiguous, "no_padding": _ones}
"""Condition -> the elements of an input that keeps it."""


def _counted(content: torch.Tensor) -> torch.Tensor:
    return content[..., :1].clamp(0, LARGEST_POSITION // 2) + torch.arange(content.shape[-1]).to(content.dtype)


KEEPING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous_positions": _counted,
    "no_padding": torch.ones_like,
}
"""Condition -> content that keeps it, made of any content."""
