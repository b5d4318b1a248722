"""Of transformers: what a model's class says that it can do, and the gate of a mixture's experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from passes.private.part import attribute

if TYPE_CHECKING:
    from torch import Tensor


def has_sdpa(model: type) -> bool:
    """Whether models of this class can compute attention by ``scaled_dot_product_attention``."""
    return bool(attribute(model, "_supports_sdpa"))


def gated(experts: Any, inner: Tensor) -> Tensor:
    """What becomes of the experts' first product [experts, tokens, 2 * width]: [experts, tokens, width]."""
    result: Tensor = attribute(experts, "_apply_gate")(inner)
    return result
