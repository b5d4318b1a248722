"""Of transformers: what a model's class says that it can do, which attention it computes, and the gate of a mixture's
experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from passes.private.part import attribute

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def has_sdpa(model: type) -> bool:
    """Whether models of this class can compute attention by ``scaled_dot_product_attention``."""
    return bool(attribute(model, "_supports_sdpa"))


def looks_attention_up(model: type) -> bool:
    """Whether layers of this class compute attention by the function that their config names, and not by their own."""
    return bool(attribute(model, "_can_set_attn_implementation")())


def attention_of(model: PreTrainedModel) -> str:
    """The name of the function that ``model`` computes attention by."""
    return str(attribute(model.config, "_attn_implementation"))


def has_flex_attention(model: type) -> bool:
    """Whether models of this class can compute attention by ``flex_attention``."""
    return bool(attribute(model, "_supports_flex_attn"))


_ATTENTION = "_attn_implementation_internal"


def configs_of(model: PreTrainedModel) -> list[Any]:
    """The configs of ``model`` and of the models within, each once, that name a function of attention."""
    configs = {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}
    return [config for config in configs.values() if hasattr(config, _ATTENTION)]


@contextmanager
def attention_named(configs: Iterable[Any], name: str) -> Iterator[None]:
    """The models of ``configs`` (:func:`configs_of`) compute attention by the function ``name`` while the block runs,
    although their class says that they cannot."""
    before = [(config, attribute(config, _ATTENTION)) for config in configs]
    try:
        for config, _ in before:
            setattr(config, _ATTENTION, name)
        yield
    finally:
        for config, was in before:
            setattr(config, _ATTENTION, was)


def gated(experts: Any, inner: Tensor) -> Tensor:
    """What becomes of the experts' first product [experts, tokens, 2 * width]: [experts, tokens, width]."""
    result: Tensor = attribute(experts, "_apply_gate")(inner)
    return result
