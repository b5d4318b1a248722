"""The project's own attention ops: what a strategy writes into a graph where ``aten`` has no word for it.

``proved_attention::native`` is the native layer with a proved fact about its mask.  ``causal`` says which
predicate the mask has been proved to equal (``none``: nothing is claimed, the mask is applied); the mask may stay
beside it as the evidence.  In PyTorch the op computes what the native layer will compute, that is from
``causal`` alone, and refuses to run if the mask it was given disagrees: every verification checks the proof.

``proved_attention::decomposed`` marks a call that is to be written out as matmul, softmax, matmul.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
        # is_causal has a fast kernel, but torch's is upper-left only.
        is_causal = causal == "upper_left" or query.shape[2] == key.shape[2]
        mask = None if is_causal else claimed
    else:
        is_causal = False
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.contiguous()


@native.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: str, scale: float) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """matmul, mask, softmax, matmul.  A blocked score becomes the type's lowest value, so a row without any key
    averages all of them instead of turning into NaN and spreading.  It is put in the score's place, not added:
    in fp16 the sum of the lowest value and a score below -16 is minus infinity."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (tensor.repeat_interleave(group, dim=1) for tensor in (key, value))
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    if is_causal:
        rows = torch.arange(query.shape[2], device=query.device).unsqueeze(1)
        mask = torch.arange(key.shape[2], device=query.device).unsqueeze(0) <= rows
    if mask is not None:
        lowest = torch.full((), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
        scores = torch.where(mask, scores, lowest) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(torch.softmax(scores, dim=-1), value)


@torch.library.custom_op("proved_attention::decomposed", mutates_args=())
def decomposed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """A marker with the meaning of :func:`written_out`; the strategy stage decomposes it away."""
    return written_out(query, key, value, mask, is_causal, scale)


@decomposed.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


NATIVE = torch.ops.proved_attention.native.default
DECOMPOSED = torch.ops.proved_attention.decomposed.default
