"""Attention of a prompt whose tokens see only their neighbours, in blocks: work and memory are linear in length.

``proved_attention::windowed`` sees the last ``width`` keys, ``proved_attention::chunked`` the past of its own chunk.  A
strategy writes them where a mask was proved to say just that, for queries that are the last of the keys.  How they are
cut into blocks is said once, here, in words (:class:`Words`) that stand for tensors of PyTorch, so that a program runs
as its engine will, and for tensors of a TensorRT network (:mod:`passes.tensorrt.local_attention`).
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

X = TypeVar("X")
"""A tensor [B, H, rows, D]."""
Size = Any
"""A whole number, or what stands for one that is known when an engine runs: it can be added, multiplied, divided."""


class Words(Protocol[X]):
    """What local attention is said in."""

    def length(self, x: X) -> Size:
        """The rows of ``x``."""

    def least(self, a: Size, b: Size) -> Size: ...

    def most(self, a: Size, b: Size) -> Size: ...

    def first(self, x: X, count: Size) -> X:
        """The first ``count`` rows of ``x``, which has as many."""

    def filled(self, x: X, start: Size, count: Size) -> X:
        """``count`` rows of ``x`` from row ``start`` on, zeros before its first, where that is negative, and behind its
        last."""

    def blocks(self, x: X, count: Size, size: Size, reach: int) -> X:
        """[B * count, H, (1 + reach) * size, D] of ``x`` [B, H, (count + reach) * size, D], cut into blocks of ``size``
        rows: block i and the next ``reach``, for the first ``count`` of them."""

    def joined(self, x: X, like: X, count: Size, size: Size) -> X:
        """[B, H, count * size, D] of ``x`` [B * count, H, size, D], blocks of a tensor with the batch of ``like``."""

    def behind(self, first: X, second: X) -> X:
        """The rows of ``first``, then those of ``second``."""

    def attention(self, query: X, key: X, value: X) -> X:
        """Causal attention, row i of which sees the keys up to i."""

    def attention_in_band(self, query: X, key: X, value: X, size: Size, reach: int, width: int) -> X:
        """Attention of ``size`` queries, row i of which sees the ``width`` keys behind key i, over
        ``(1 + reach) * size`` of them."""

    def attention_in_place(
        self, query: X, key: X, value: X, count: Size, size: int, reach: int, width: int, past: Size
    ) -> X:
        """Attention of ``count`` blocks of ``size`` queries, row i of which sees the last ``width`` keys up to key
        reach * size + i, over ``(1 + reach) * size`` of them, the first of which is key ``past - reach * size`` of the
        text in the first block: none before the text."""


def in_windows(words: Words[X], query: X, key: X, value: X, width: int, block: int, shrinks: bool) -> X:
    """Attention of query [B, Hq, L, D] over key [B, Hkv, L, D], value [B, Hkv, L, Dv]; row q sees the keys
    q - width + 1 .. q.

    The first ``width`` rows see all of their past: that is causal attention, without a mask.  The others are cut into
    blocks of ``block`` queries.  The one that begins at row w + i sees keys i + 1 .. w + i + block - 1, those of
    1 + w / block blocks; and which row of it sees which of those is the same for every i, so that one small mask does
    for all.  Rows and keys beyond the length are zeros, and what comes of them is cut off.

    An engine that is built for many lengths makes one block at least.  Where nothing is left for it, it is made for
    nothing, or, if a block ``shrinks``, of one query.
    """
    length = words.length(query)
    first = words.least(length, width)
    start = words.attention(*(words.first(x, first) for x in (query, key, value)))
    rest, reach = length - first, -(-width // block)
    count = words.most((rest + block - 1) // block, 1)
    size = words.least(words.most(rest * block, 1), block) if shrinks else block
    queries = words.blocks(words.filled(query, first, count * size), count, size, 0)
    keys, values = (words.blocks(words.filled(x, 0, (count + reach) * size), count, size, reach) for x in (key, value))
    made = words.attention_in_band(queries, keys, values, size, reach, width)
    return words.first(words.behind(start, words.joined(made, query, count, size)), length)


def in_windows_behind(words: Words[X], query: X, key: X, value: X, width: int, block: int) -> X:
    """Attention of query [B, Hq, L, D] over key [B, Hkv, S, D], value [B, Hkv, S, Dv]; row q, which is at place
    p = q + S - L of the keys, sees the keys p - width + 1 .. p.

    All rows are cut into blocks.  How many keys the text has before the window of the first of them may be known only
    when an engine runs, so each block has a mask of its own.
    """
    length = words.length(query)
    past, reach = words.length(key) - length, -(-width // block)
    count = (length + block - 1) // block
    queries = words.blocks(words.filled(query, 0, count * block), count, block, 0)
    near = (words.filled(x, past - reach * block, (count + reach) * block) for x in (key, value))
    keys, values = (words.blocks(x, count, block, reach) for x in near)
    made = words.attention_in_place(queries, keys, values, count, block, reach, width, past)
    return words.first(words.joined(made, query, count, block), length)


def in_chunks(words: Words[X], query: X, key: X, value: X, size: int) -> X:
    """Attention of query [B, Hq, L, D] over key [B, Hkv, L, D], value [B, Hkv, L, Dv]; row q sees the keys
    q // size * size .. q.

    A chunk is a sequence of its own, and plain causal attention of it.  The last one is filled up with zeros behind
    its rows, which a causal mask hides.
    """
    length = words.length(query)
    each = words.least(length, size)
    count = (length + size - 1) // size
    chunks = (words.blocks(words.filled(x, 0, count * each), count, each, 0) for x in (query, key, value))
    return words.first(words.joined(words.attention(*chunks), query, count, each), length)


def band(size: int, reach: int, width: int) -> Tensor:
    """[size, (1 + reach) * size] bool: row i sees the ``width`` keys behind key i."""
    behind = torch.arange((1 + reach) * size) - torch.arange(size)[:, None]
    return (behind > 0) & (behind <= width)


def last_keys(size: int, reach: int, width: int) -> Tensor:
    """[size, (1 + reach) * size] bool: row i sees the last ``width`` keys up to key reach * size + i."""
    behind = torch.arange(size)[:, None] + reach * size - torch.arange((1 + reach) * size)
    return (behind >= 0) & (behind < width)


class InTorch:
    """The words for tensors of PyTorch; ``scale`` is a factor of the scores."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def length(self, x: Tensor) -> int:
        return x.shape[2]

    def least(self, a: int, b: int) -> int:
        return min(a, b)

    def most(self, a: int, b: int) -> int:
        return max(a, b)

    def first(self, x: Tensor, count: int) -> Tensor:
        return x[:, :, :count]

    def filled(self, x: Tensor, start: int, count: int) -> Tensor:
        before = min(max(-start, 0), count)
        found = x[:, :, max(start, 0) : max(start + count, 0)]
        return torch.nn.functional.pad(found, (0, 0, before, count - before - found.shape[2]))

    def blocks(self, x: Tensor, count: int, size: int, reach: int) -> Tensor:
        batch, heads, _, channels = x.shape
        each = x.reshape(batch, heads, count + reach, size, channels)
        near = torch.cat([each[:, :, i : i + count] for i in range(1 + reach)], 3)
        return near.transpose(1, 2).reshape(batch * count, heads, -1, channels)

    def joined(self, x: Tensor, like: Tensor, count: int, size: int) -> Tensor:
        _, heads, _, channels = x.shape
        apart = x.reshape(len(like), count, heads, size, channels)
        return apart.transpose(1, 2).reshape(len(like), heads, count * size, channels)

    def behind(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second], 2)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
        )

    def attention_in_band(self, query: Tensor, key: Tensor, value: Tensor, size: int, reach: int, width: int) -> Tensor:
        return self.attention(query, key, value, band(size, reach, width).to(query.device))

    def attention_in_place(
        self, query: Tensor, key: Tensor, value: Tensor, count: int, size: int, reach: int, width: int, past: int
    ) -> Tensor:
        first = torch.arange(count)[:, None] * size + past - reach * size
        there = first + torch.arange((1 + reach) * size) >= 0
        mask = last_keys(size, reach, width) & there[:, None, :]
        rows = mask.repeat(len(query) // count, 1, 1).unsqueeze(1)
        return self.attention(query, key, value, rows.to(query.device))


@torch.library.custom_op("proved_attention::windowed", mutates_args=())
def windowed(query: Tensor, key: Tensor, value: Tensor, width: int, block: int, shrinks: bool, scale: float) -> Tensor:
    """:func:`in_windows`, or :func:`in_windows_behind` of more keys than queries."""
    if query.shape[2] == key.shape[2]:
        return in_windows(InTorch(scale), query, key, value, width, block, shrinks).contiguous()
    return in_windows_behind(InTorch(scale), query, key, value, width, block).contiguous()


@torch.library.custom_op("proved_attention::chunked", mutates_args=())
def chunked(query: Tensor, key: Tensor, value: Tensor, size: int, scale: float) -> Tensor:
    """:func:`in_chunks`."""
    return in_chunks(InTorch(scale), query, key, value, size).contiguous()


@windowed.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, width: int, block: int, shrinks: bool, scale: float) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@chunked.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, size: int, scale: float) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def windowed_in_aten(
    query: Tensor, key: Tensor, value: Tensor, width: int, block: int, shrinks: bool, scale: float
) -> Tensor:
    """What :func:`windowed` computes, in torch's own words, whose mask is of every query and key."""
    q, k = _places(query, key)
    return InTorch(scale).attention(query, key, value, (k <= q) & (q - k < width)).contiguous()


def chunked_in_aten(query: Tensor, key: Tensor, value: Tensor, size: int, scale: float) -> Tensor:
    """What :func:`chunked` computes, in torch's own words, whose mask is of every query and key."""
    q, k = _places(query, key)
    return InTorch(scale).attention(query, key, value, (k <= q) & (k // size == q // size)).contiguous()


def _places(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    length, keys = query.shape[2], key.shape[2]
    return torch.arange(length, device=query.device)[:, None] + (keys - length), torch.arange(keys, device=query.device)


WINDOWED = torch.ops.proved_attention.windowed.default
CHUNKED = torch.ops.proved_attention.chunked.default
