"""Mixtures of experts as plain products, while a model is traced.

transformers computes them with ``torch._grouped_mm``, which TensorRT has no layer for.  Its other form, ``batched_mm``,
copies the chosen experts' weights for every token: right for a few tokens, and terabytes for a prompt of Mixtral's
(2048 tokens of 2 experts of 0.35 GB).  So where the tokens choose more experts than there are, every expert computes
every token here, and what was not chosen counts for nothing: experts / chosen times the work, at the matrix products'
full speed.

TensorRT's own layer for them (``add_moe``) is for compute capabilities 10.0, 10.3 and 11.0 (NVIDIA's manual, "MoE",
2026), none of which TensorRT-RTX builds for: RTX 1.6 refuses it, in fp16 and bf16, for each one that it names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.private.of_transformers import gated

NAME = "plain_products"


@contextmanager
def plain_experts(model: PreTrainedModel) -> Iterator[None]:
    """Experts of ``model`` as plain products while the block runs; a model without any stays as it is."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    before = model.get_experts_implementation()
    ALL_EXPERTS_FUNCTIONS[NAME] = _experts
    try:
        model.set_experts_implementation(NAME)
        yield
    finally:
        model.set_experts_implementation(before)
        del ALL_EXPERTS_FUNCTIONS[NAME]


def _experts(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Stands in for the ``forward`` of a module that ``use_experts_implementation`` decorates, whose attributes say
    what its experts are.

    ``hidden`` [tokens, width]; ``chosen`` [tokens, k], each token's experts, and what their results count, ``weights``
    [tokens, k].  Returns [tokens, width].
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    tokens = hidden.shape[0]
    if isinstance(tokens, int) and tokens * chosen.shape[1] <= experts.num_experts:
        result: Tensor = ALL_EXPERTS_FUNCTIONS["batched_mm"](experts, hidden, chosen, weights)
        return result
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = _products(experts, first, hidden)
    inner = gated(experts, inner) if experts.has_gate else experts.act_fn(inner)
    made = _products(experts, "down_proj", inner)
    if experts.has_post_expert_norm:
        made = experts.post_expert_norm(made)
    counted = torch.arange(experts.num_experts, device=chosen.device)[:, None, None] == chosen  # [experts, tokens, k]
    factors = torch.where(counted, weights, 0).sum(-1, keepdim=True)
    # Not only times 0: an expert that was not chosen may overflow, and infinity times 0 is no number.
    made = torch.where(counted.any(-1, keepdim=True), made * factors, 0)
    return made.sum(0).to(hidden.dtype)


def _products(experts: Any, name: str, rows: Tensor) -> Tensor:
    """``rows`` [tokens, in] or [experts, tokens, in] times every expert's weight: [experts, tokens, out]."""
    weight = getattr(experts, name)
    made = torch.matmul(rows, weight if experts.is_transposed else weight.transpose(1, 2))
    return made + getattr(experts, f"{name}_bias").unsqueeze(1) if experts.has_bias else made
