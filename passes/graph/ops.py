"""The project's own attention ops: what a strategy writes into a graph where ``aten`` has no word for it.

``proved_attention::native`` is the native layer with a proved fact about its mask.  ``causal`` says which
predicate the mask has been proved to equal (``none``: nothing is claimed, the mask is applied); the mask may stay
beside it as the evidence.  In PyTorch the op computes what the native layer will compute, that is from
``causal`` alone, and refuses to run if the mask it was given disagrees: every verification checks the proof.

``proved_attention::decomposed`` marks a call that is to be written out as matmul, softmax, matmul.

``proved_attention::blanked`` stands behind a native layer that is handed a mask whose rows may see no key.  All of them
give 0 for such a row, as ``scaled_dot_product_attention`` does where a bool mask or one of -inf blocks every key.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

CAUSAL_KINDS = ("none", "upper_left", "lower_right")


def causal_mask(kind: str, length: int, keys: int, device: torch.device) -> Tensor:
    """[length, keys] bool, True where query i may attend to key j: j <= i (upper-left) or j <= i + keys - length."""
    offset = keys - length if kind == "lower_right" else 0
    return torch.ones(length, keys, dtype=torch.bool, device=device).tril(offset)


def _says(mask: Tensor, claimed: Tensor) -> Tensor:
    """Where ``mask`` [B, H, L, S], bool or added to the scores, says what ``claimed`` [L, S] says."""
    if mask.dtype == torch.bool:
        return mask == claimed
    return torch.where(claimed, mask == 0, mask <= torch.finfo(mask.dtype).min)


@torch.library.custom_op("proved_attention::native", mutates_args=())
def native(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: str, scale: float) -> Tensor:
    """Attention of query [B, Hq, L, D] over key [B, Hkv, S, D], value [B, Hkv, S, Dv]; Hq % Hkv == 0."""
    if causal != "none":
        claimed = causal_mask(causal, query.shape[2], key.shape[2], query.device)
        if mask is not None and not bool(_says(mask, claimed).all()):
            raise AssertionError(f"the mask was proved {causal} causal but is not: the proof is wrong")
    return native_in_aten(query, key, value, mask, causal, scale)


def native_in_aten(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: str, scale: float) -> Tensor:
    """What :func:`native` computes, in torch's own words."""
    # is_causal has a fast kernel, but torch's is upper-left only; a chunk's keys are as many as its queries at times.
    square = bool(statically_known_true(query.shape[2] == key.shape[2]))
    is_causal = causal == "upper_left" or (causal == "lower_right" and square)
    if causal != "none":
        mask = None if is_causal else causal_mask(causal, query.shape[2], key.shape[2], query.device)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.contiguous()


@native.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: str, scale: float) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def sees_a_key(mask: Tensor) -> Tensor:
    """[..., L, 1] bool: which rows of ``mask`` [..., L, S], bool or added to the scores, attend to any key."""
    return (mask if mask.dtype == torch.bool else mask > -torch.inf).any(-1, keepdim=True)


def without_unseeing(out: Tensor, mask: Tensor) -> Tensor:
    """The attention ``out`` [B, H, L, Dv] with 0 in the rows that see no key by ``mask`` [..., L or 1, S or 1].

    Chosen, not multiplied: what stands in such a row may be no number."""
    return torch.where(sees_a_key(mask), out, torch.zeros((), dtype=out.dtype, device=out.device))


def written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    sees_keys: bool = False,
) -> Tensor:  # fmt: skip
    """matmul, mask, softmax, matmul; ``sees_keys``: every row of ``mask`` is known to see a key.

    A score is never less than the type's lowest value, so that a row without any key is no NaN, which would spread.
    That value is put in a blocked score's place, not added: in fp16 the sum of the lowest value and a score below -16
    is minus infinity, and so it is with an additive mask that holds the lowest value."""
    many = query.shape[1]
    key, value = (x.repeat_interleave(many // x.shape[1], 1) if x.shape[1] < many else x for x in (key, value))
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    if is_causal:
        rows = torch.arange(query.shape[2], device=query.device).unsqueeze(1)
        mask, sees_keys = torch.arange(key.shape[2], device=query.device).unsqueeze(0) <= rows, True
    if mask is not None:
        lowest = torch.full((), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
        if mask.dtype == torch.bool:
            scores = torch.where(mask, scores, lowest)
        else:
            scores = torch.maximum((scores + mask).to(scores.dtype), lowest)
    out = torch.matmul(torch.softmax(scores, dim=-1), value)
    return out if mask is None or sees_keys else without_unseeing(out, mask)


@torch.library.custom_op("proved_attention::decomposed", mutates_args=())
def decomposed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    sees_keys: bool = False,
) -> Tensor:  # fmt: skip
    """A marker with the meaning of :func:`written_out`; the strategy stage decomposes it away."""
    return written_out(query, key, value, mask, is_causal, scale, sees_keys)


@decomposed.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float,
    sees_keys: bool = False,
) -> Tensor:  # fmt: skip
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@torch.library.custom_op("proved_attention::blanked", mutates_args=())
def blanked(out: Tensor, mask: Tensor) -> Tensor:
    """A marker with the meaning of :func:`without_unseeing`; lowering decomposes it away."""
    return without_unseeing(out, mask)


@blanked.register_fake
def _(out: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(out)


BLANKED = torch.ops.proved_attention.blanked.default
NATIVE = torch.ops.proved_attention.native.default
DECOMPOSED = torch.ops.proved_attention.decomposed.default
