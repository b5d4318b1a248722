"""Attention that transformers has no ``scaled_dot_product_attention`` for, while a model is traced: in words that can
become layers.

transformers writes such attention out ("eager").  Two kinds of it have a form of their own here; what a model's own
code writes out, without asking which function it is to take (BLOOM, MPT), stays as it is.

*Sinks* (GPT-OSS): each head has a number that takes part in the softmax as one more score, and counts for nothing in
the sum.  That is a key of its own before all others, whose value is zero, and whose score is that number for every
query: one more channel, in which that key is 1 and the others are 0, and in which the query has the number over the
scale.  What a query sees of the other keys stays what it was, moved by one; so a causal mask stays one, aligned at the
lower right.

*A soft cap* (Gemma 2): scores go through ``cap * tanh(score / cap)``, which no attention layer of TensorRT does.  It is
written out, over whole numbers of heads and without float masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from pipeline.private.of_transformers import attention_named, attention_of, configs_of, looks_attention_up

CHANNELS = 8
"""Fused kernels want head sizes that are multiples of it."""


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """While the block runs, ``model`` computes attention by :func:`_attention`, where it would write it out otherwise
    and lets itself be told."""
    if attention_of(model) != "eager" or not looks_attention_up(type(model)) or not _asks(model):
        yield
        return
    with _computed_by(model, _attention):
        yield


@contextmanager
def _computed_by(model: PreTrainedModel, function: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Under the library's own name for it: masks are then made as for that, and bool.
    functions: AttentionInterface = ALL_ATTENTION_FUNCTIONS
    functions["sdpa"] = function
    try:
        with attention_named(configs_of(model), "sdpa"):
            yield
    finally:
        del functions["sdpa"]  # the local entry; the library's own stands behind it


def _asks(model: PreTrainedModel) -> bool:
    """Whether the decoder of ``model`` takes the function that it is told.  That a class can be told says less: in GIT
    the part that sees pictures asks, and the decoder adds whatever mask it is given to its scores, a bool one too."""
    asked = []

    def counted(*given: Any, **more: Any) -> tuple[Tensor, None]:
        asked.append(True)
        return _attention(*given, **more)

    tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    with torch.no_grad(), _computed_by(model, counted):
        model(input_ids=tokens, use_cache=False)
    return bool(asked)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions: query [B, Hq, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv], mask bool
    [B, 1, L, S] or None for a causal one; ``s_aux`` [Hq], the sinks.  Returns [B, L, Hq, Dv] and no weights."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if softcap is None and s_aux is None:
        made: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
        return made
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None and query.shape[2] != 1:
        attention_mask = _causal(query, key)
    if s_aux is not None:
        query, key, value = _with_sinks(query, key, value, s_aux / scale)
        attention_mask = None if attention_mask is None else torch.constant_pad_nd(attention_mask, (1, 0), True)
    group = query.shape[1] // key.shape[1]
    key, value = _repeated(key, group), _repeated(value, group)
    if softcap is None:
        output = scaled_dot_product_attention(query, key, value, attention_mask, scale=scale)
    else:
        scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
        if attention_mask is not None:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        output = scores.float().softmax(-1).to(value.dtype) @ value
    return output.transpose(1, 2).contiguous(), None


def _causal(query: Tensor, key: Tensor) -> Tensor:
    rows, columns = (torch.arange(each.shape[2], device=each.device) for each in (query, key))
    return (columns[None] <= rows[:, None])[None, None]


def _with_sinks(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three with a channel more, filled up to a multiple of :data:`CHANNELS`, and a key more before the others,
    whose score is ``sinks`` [Hq] times the scale and whose value is 0."""
    batch, heads, length, size = query.shape
    more = CHANNELS - size % CHANNELS
    number = sinks.to(query.dtype).view(1, heads, 1, 1).expand(batch, heads, length, 1)
    query = torch.cat([query, pad(number, (0, more - 1))], -1)
    channel = torch.arange(size + more, device=key.device) == size
    first = channel.to(key.dtype).view(1, 1, 1, -1).expand(batch, key.shape[1], 1, -1)
    key = torch.cat([first, pad(key, (0, more))], 2)
    nothing = torch.zeros(batch, value.shape[1], 1, value.shape[3], dtype=value.dtype, device=value.device)
    return query, key, torch.cat([nothing, value], 2)


def _repeated(tensor: Tensor, group: int) -> Tensor:
    """[B, H, S, D] with each head ``group`` times."""
    batch, heads, length, size = tensor.shape
    if group == 1:
        return tensor
    return tensor[:, :, None].expand(batch, heads, group, length, size).reshape(batch, heads * group, length, size)
