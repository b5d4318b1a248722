"""A catalogue of masks that tempt a prover: each entry is a mask, and what may become of it.

``DROPPED`` may be dropped, as the class that is named; ``KEPT`` may not, since it is another mask at some length, in
some batch or head, or for some content of the inputs.  ``tests/test_mask_catalogue.py`` asks the prover about each and
asks PyTorch who is right.

In the programs ``L`` and ``S`` are the numbers of queries and keys, ``q`` [L, 1] and ``k`` [1, S] their places, ``C``
[L, S] the causal mask; ``ids`` (int64 [S]), ``keep`` (bool [S]) and ``t`` (int64 []) are run-time inputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from passes.tensorrt.versions import quiet


class Setting(NamedTuple):
    """Shapes of the attention calls: batch and heads of query and key, keys before the first query, lengths."""

    query: tuple[int, int] = (1, 2)
    key: tuple[int, int] = (1, 2)
    past: int = 0
    lengths: tuple[int, int] = (1, 40)


SETTINGS = {
    "1 to 40 tokens": Setting(),
    "behind 3 past keys": Setting(past=3),
    "7 tokens, static": Setting(lengths=(7, 7)),
    "one query head, two key heads": Setting(query=(1, 1)),
    "two batches of queries, one of keys": Setting(query=(2, 2)),
    "two batches and heads": Setting(query=(2, 2), key=(2, 2)),
    "one head": Setting(query=(1, 1), key=(1, 1)),
}

# Setting -> class -> what is pinned -> program.  "kept" is no class: a mask that is none of those that may be dropped.
CATALOGUE: dict[str, dict[str, dict[str, str]]] = {
    "1 to 40 tokens": {
        "causal": {
            # -- the same thing said in other words
            "keys up to the query": "k <= q",
            "queries from the key on": "q >= k",
            "a distance below one": "k - q < 1",
            "not in the future": "~(k > q)",
            "a lower triangle": "torch.ones(L, S, dtype=torch.bool).tril()",
            "no upper triangle": "~torch.ones(L, S, dtype=torch.bool).triu(1)",
            "a triangle of integers": "torch.ones(L, S, dtype=torch.int64).tril() == 1",
            "a triangle of bytes": "torch.ones(L, S, dtype=torch.uint8).tril().bool()",
            "the place of a last key": "k <= q + (S - L)",
            "turned over twice": "C.flip(0).flip(1).flip(1).flip(0)",
            "transposed twice": "C.T.contiguous().T",
            "the transposed anti-causal mask": "(q <= k).T",
            "a choice between itself and itself": "torch.where(keep[None], C, C)",
            "both sides of a condition": "(C & keep[None]) | (C & ~keep[None])",
            "absorbed": "C & (C | keep[None])",
            "excluded twice": "C ^ keep[None] ^ keep[None]",
            "counted from behind": "(S - 1 - k) >= (L - 1 - q)",
            "doubled places": "2 * k <= 2 * q + 1",
            "of the larger of both": "torch.maximum(q, k) == q",
            "of the smaller of both": "torch.minimum(q, k) == k",
            "no positive part": "(k - q).clamp(min=0) == 0",
            "the absolute distance is the distance": "(q - k).abs() == q - k",
            "gathered by its own places": "C[q, k]",
            "a rounded-down quotient": "torch.div(k - q + 1, 2, rounding_mode='floor') <= 0",
            "rows chosen in order": "C.index_select(0, torch.arange(L))",
            "a void segment test beside it": "C & ((torch.diff(torch.arange(S), prepend=torch.tensor([-1])) != 1)"
            ".cumsum(0)[None] == (torch.diff(torch.arange(S), prepend=torch.tensor([-1])) != 1).cumsum(0)[:L, None])",
            "a void padding test beside it": "C & torch.ones(S, dtype=torch.bool)[None]",
            "rows that see nothing repaired, where none is": "C | ~C.any(1, keepdim=True)",
            # -- windows and chunks that never bite
            "a window as wide as the profile": "C & (q - k < 40)",
            "a window of all keys": "C & (q - k < S)",
            "a chunk as long as the profile": "C & (q // 40 == k // 40)",
            "a distance that is never reached": "C & (q - k != 40)",
            "sinks beside a window that never bites": "C & ((q - k < 40) | (k < 4))",
            # -- types that hold what they must
            "places in bytes": "k.to(torch.uint8) <= q.to(torch.uint8)",
            "places in signed bytes": "k.to(torch.int8) <= q.to(torch.int8)",
            "mixed integer types": "k.to(torch.int16) <= q",
            "bytes against a scalar they hold": "C & (k.to(torch.uint8) < 255)",
            "bytes are never negative": "C & (k.to(torch.uint8) >= 0)",
            "a sum that a byte still holds": "(k.to(torch.uint8) + 200) <= (q.to(torch.uint8) + 200)",
            "an upper bound above the type": "C & (k.to(torch.uint8).clamp(max=255) >= 0)",
            "a bool as a number": "C.to(torch.int8) > 0",
            # -- sizes
            "one row in each of several": "torch.stack([C, C], 2).select(2, 0)",
            "cut at its own size": "C[:L, :S]",
            "cut far behind its end": "C[: L + 100, : 2**40]",
            "put together from its rows": "torch.cat([C[:1], C[1:]])",
            "put together from its columns": "torch.cat([C[:, :1], C[:, 1:]], 1)",
            "padded and cut": "torch.constant_pad_nd(C, (1, 1, 1, 1), True)[1 : L + 1, 1 : S + 1]",
            "a batch of one": "C[None, None]",
            "expanded to all heads": "C[None, None].expand(1, 2, L, S)",
            "stacked alike for each head": "torch.stack([C, C])[None]",
            # -- masks that are added
            "zero and minus infinity": "torch.where(C, 0.0, -inf)",
            "filled with minus infinity": "torch.zeros(L, S).masked_fill(~C, -inf)",
            "filled with the least number": "torch.zeros(L, S).masked_fill(~C, LEAST)",
            "an upper triangle of minus infinity": "torch.full((L, S), -inf).triu(1)",
            "the least number times what is blocked": "(1.0 - C.float()) * LEAST",
            "minus infinity in half precision": "torch.where(C, 0.0, -inf).half()",
            "the least half": "torch.zeros(L, S, dtype=torch.float16).masked_fill(~C, -65504.0)",
            "a number below the least half": "torch.zeros(L, S).masked_fill(~C, -1e5).half()",
            "minus infinity in bfloat16": "torch.where(C, 0.0, -inf).bfloat16()",
            "a least number of another type": "torch.where(C, 0.0, LEAST).double().float()",
            "the logarithm of a mask, as a choice": "torch.where(C.float() == 0, -inf, 0.0)",
            "minus zero attends too": "torch.where(C, -0.0, -inf)",
            "two added masks, one void": "torch.where(C, 0.0, -inf) + torch.zeros(1, S)",
            "a least number that two masks double": "torch.where(C, 0.0, LEAST) + torch.where(C, 0.0, LEAST)",
            "the smaller of mask and zero": "torch.minimum(torch.where(C, 0.0, -inf), torch.zeros(L, S))",
            "read back as bool": "torch.where(C, 0.0, -inf) == 0",
            "not infinite": "~torch.where(C, 0.0, -inf).isinf()",
        },
        "full": {
            "everything": "torch.ones(L, S, dtype=torch.bool)",
            "one row for all queries": "torch.ones(1, S, dtype=torch.bool)",
            "one column for all keys": "torch.ones(L, 1, dtype=torch.bool)",
            "one element for all": "torch.ones(1, 1, dtype=torch.bool)",
            "a size that is 1 at every length": "torch.ones(L // 41 + 1, S, dtype=torch.bool)",
            "the first column of a causal mask": "C[:, :1]",
            "the last row of a causal mask": "C[-1:]",
            "a causal mask or its opposite": "C | ~C",
            "zeros": "torch.zeros(L, S)",
            "a mask that is taken from itself": "torch.where(C, 0.0, LEAST) - torch.where(C, 0.0, LEAST)",
            "no key is negative": "(k >= 0).expand(L, S)",
            "what is a mask or not": "keep[None] | ~keep[None]",
            "any of a row": "C.any(1, keepdim=True)",
        },
        "kept": {
            # -- a size that is 1 somewhere, or everywhere
            "the first row of a triangle": "torch.ones(L // 41 + 1, S, dtype=torch.bool).tril()",
            "the first row of a causal mask": "C[:1]",
            "the first row, cut by a size that is 1": "C[: L // 41 + 1]",
            "the last column of a causal mask": "C[:, -1:]",
            "a lower triangle of one column": "torch.ones(L, 1, dtype=torch.bool).triu()",
            "places of one query": "k <= torch.arange(L // 41 + 1)[:, None]",
            "places of one key": "(torch.arange(S // 41 + 1)[None] <= q) & (k <= 3)",
            "a row that is empty at the longest": "k <= q - L // 40",
            # -- off by one
            "without the diagonal": "k < q",
            "one into the future": "k <= q + 1",
            "one into the past": "k <= q - 1",
            "one more key at the last query": "C | ((q == L - 1) & (k == S - 1)) ^ (k == S - 1)",
            "one key less": "C & ~((q == 7) & (k == 3))",
            "one key less at the longest": "C & ~((q == 39) & (k == 0))",
            "one key more at the longest": "C | ((q == 38) & (k == 39))",
            "the first key blocked for the last query of the longest": "C & ((q < 39) | (k > 0))",
            "a diagonal too high": "torch.ones(L, S, dtype=torch.bool).tril(1)",
            "a diagonal too low": "torch.ones(L, S, dtype=torch.bool).tril(-1)",
            "an upper triangle": "torch.ones(L, S, dtype=torch.bool).triu()",
            "upside down": "C.flip(0)",
            "back to front": "C.flip(1)",
            "turned over": "C.flip(0).flip(1) & (k < 30)",
            "transposed": "C.T",
            "nothing": "torch.zeros(L, S, dtype=torch.bool)",
            "rows in another order": "C[(L - 1 - q), k]",
            "clamped places": "C[q.clamp(max=20), k]",
            "rolled columns": "torch.cat([C[:, 1:], C[:, :1]], 1)",
            "padded and cut elsewhere": "torch.constant_pad_nd(C, (1, 1, 1, 1), True)[:L, :S]",
            # -- windows and chunks
            "a window one narrower than the profile": "C & (q - k < 39)",
            "a window": "C & (q - k < 8)",
            "a window of one": "C & (q == k)",
            "a window with sinks": "C & ((q - k < 8) | (k < 4))",
            "a chunk one shorter than the profile": "C & (q // 39 == k // 39)",
            "chunks": "C & (q // 8 == k // 8)",
            "a dilated window": "C & ((q - k) % 2 == 0)",
            "blocks in both directions": "q // 8 == k // 8",
            "a prefix that sees itself": "C | (k < 4) & (q < 4)",
            "a global token": "C | (k == 20)",
            # -- types that do not hold what they are given
            "a byte wraps within the profile": "(k.to(torch.uint8) + 230) <= (q.to(torch.uint8) + 230)",
            "a signed byte wraps within the profile": "(k.to(torch.int8) + 100) <= (q.to(torch.int8) + 100)",
            "bytes multiplied": "(k.to(torch.uint8) * 8) <= (q.to(torch.uint8) * 8)",
            "bytes clamped from below by -1": "k.to(torch.uint8).clamp(min=-1) <= q",
            "integers rounded by a half": "C & (lambda d: (d == 2048) | (d == 0))("
            "torch.diff(torch.full((S,), 2049), prepend=torch.ones(1, dtype=torch.float16)))[None]",
            "places above 2048 in half precision": "(k + 2048).half() <= (q + 2048).half()",
            "places above 256 in bfloat16": "(k + 256).bfloat16() <= (q + 256).bfloat16()",
            "places above 2^24 in single precision": "(k + 2**24).float() <= (q + 2**24).float()",
            "a byte is never 256": "C & (k.to(torch.uint8) + 255 >= 255)",
            "the negative of a byte": "(-k.to(torch.uint8)).long() <= 0",
            "a product that overflows": "(k * 2**62) <= (q * 2**62)",
            "a bool summed": "(C.to(torch.int8) + C.to(torch.int8)) == 1",
            "a halved place": "k // 2 <= q // 2",
            "a relu of the distance": "(k - q).relu() == 0",
            "a truncated quotient": "torch.div(k - q, 2, rounding_mode='trunc') <= 0",
            "a remainder": "(k - q) % 5 <= 0",
            "a least number made absolute": "C & ((k - 2**63 + 1 - 1).abs() >= 0)",
            # -- heads that differ
            "a second head that sees all": "torch.stack([C, torch.ones(L, S, dtype=torch.bool)])[None]",
            "a first head that sees all": "torch.stack([torch.ones(L, S, dtype=torch.bool), C])[None]",
            "a second head without its diagonal": "torch.stack([C, k < q])[None]",
            "heads of different windows": "torch.stack([C, C & (q - k < 39)])[None]",
            "a head by a slope": "(torch.tensor([0.0, 0.5])[:, None, None] * (k - q)).masked_fill(~C, -inf)[None]",
            # -- what is added
            "a small bias": "torch.where(C, 1e-8, -inf)",
            "a bias at one key": "torch.where(C, 0.0, -inf) + (k == 5) * 0.5",
            "a finite block": "torch.where(C, 0.0, -1e4)",
            "a block above the least half": "torch.zeros(L, S, dtype=torch.float16).masked_fill(~C, -65472.0)",
            "minus infinity times zero": "(1.0 - C.float()) * -inf",
            "infinity for the future": "torch.where(C, 0.0, inf)",
            "zero for the future": "torch.where(C, -inf, 0.0)",
            "the logarithm of twice the mask": "torch.where(C, 0.6931, -inf)",
            "alibi": "(0.25 * (k - q)).masked_fill(~C, -inf)",
            "a mask that cancels itself": "torch.where(C, 0.0, LEAST) - LEAST",
            "a soft edge": "torch.where(k <= q, 0.0, torch.where(k <= q + 1, -5.0, -inf))",
            # -- run-time inputs
            "padding": "C & keep[None]",
            "padding of queries": "C & keep[:L, None]",
            "padding, repaired": "C | ~keep[None]",
            "packed": "C & (ids[None] == ids[:L, None])",
            "positions that are given": "ids[None] <= ids[:L, None]",
            "an offset that is given": "k <= q + t",
            "an offset that is clamped": "k <= q + t.clamp(0, 1)",
            "an offset that is clamped to a bit": "k <= q + (t > 7).long()",
            "a switch between two masks": "torch.where(t > 0, C, k < q)",
            "padding as a number": "C & (keep.long().cumsum(0) > 0)[None]",
            "a product with the mask": "C.float() * keep.float()[None] > 0.5",
            "the logarithm of the padding": "torch.where(C & keep[None], 0.0, -inf)",
            "a row of the mask chosen by an input": "C[ids[:L, None].clamp(0, L - 1), k]",
            "an identity that overflow breaks": "C & (ids[None] - 1 < ids[None])",
            "an absolute value that overflow breaks": "C & (ids[None].abs() >= 0)",
            "a square that overflow breaks": "C & (ids[None] * ids[None] >= 0)",
            "a sum that overflow breaks": "(k + t <= q + t)",
            "a number from the input as a size": "k <= q + torch.zeros_like(t + k + q).cumsum(0)[:1] * t + t",
        },
    },
    "behind 3 past keys": {
        "causal_lower_right": {
            "the query's place among the keys": "k <= q + 3",
            "the place by sizes": "k <= q + (S - L)",
            "the last rows of a square": "(torch.arange(S)[None] <= torch.arange(S)[:, None])[S - L :]",
            "the same, counted from behind": "(torch.arange(S)[None] <= torch.arange(S)[:, None])[-L:]",
            "a triangle that is lower right": "torch.ones(L, S, dtype=torch.bool).tril(3)",
            "added": "torch.where(k <= q + 3, 0.0, -inf)",
        },
        "causal": {"upper left, whatever the past": "k <= q"},
        "kept": {
            "the first rows of a square, shifted": "(torch.arange(S)[None] <= torch.arange(S)[:, None])[1 : L + 1]",
            "one key too few": "k <= q + 2",
            "one key too many": "k <= q + 4",
            "past keys only": "(k < 3).expand(L, S)",
            "a window over the past": "(k <= q + 3) & (q + 3 - k < 40)",
            "the first row of a square": "(torch.arange(S)[None] <= torch.arange(S)[:, None])[:1]",
            "the present only": "(k <= q + 3) & (k >= 3)",
        },
    },
    "7 tokens, static": {
        "causal": {
            "a constant table": "torch.tensor([[j <= i for j in range(7)] for i in range(7)])",
            "a window of seven": "C & (q - k < 7)",
            "a chunk of seven": "C & (q // 7 == k // 7)",
            "a table of added numbers": "torch.tensor([[0.0 if j <= i else -inf for j in range(7)] for i in range(7)])",
            "reshaped": "C.reshape(49).reshape(7, 7)",
        },
        "full": {"the eighth query's row": "k <= q + 6"},
        "kept": {
            "a constant table with one mistake": "torch.tensor([[j <= i and (i, j) != (5, 2) for j in range(7)] "
            "for i in range(7)])",
            "a window of six": "C & (q - k < 6)",
            "reshaped from another size": "torch.constant_pad_nd(C, (0, 1)).reshape(56)[:49].reshape(7, 7)",
        },
    },
    "one query head, two key heads": {
        "causal": {
            "one mask for both": "C",
            "the same mask for each": "torch.stack([C, C])[None]",
        },
        "kept": {
            "a second key head that sees all": "torch.stack([C, torch.ones(L, S, dtype=torch.bool)])[None]",
            "a second key head that sees nothing": "torch.stack([C, torch.zeros(L, S, dtype=torch.bool)])[None]",
            "a batch of its own": "torch.stack([C, C])[:, None]",
        },
    },
    "two batches of queries, one of keys": {
        "causal": {"the same mask for each": "torch.stack([C, C])[:, None]"},
        "kept": {
            "a second batch that sees all": "torch.stack([C, torch.ones(L, S, dtype=torch.bool)])[:, None]",
            "a first batch that sees all": "torch.stack([torch.ones(L, S, dtype=torch.bool), C])[:, None]",
        },
    },
    "two batches and heads": {
        "causal": {
            "one mask for all": "C[None, None].expand(2, 2, L, S)",
            "one for each head": "torch.stack([C, C])[None].expand(2, 2, L, S)",
        },
        "kept": {
            "one head of one batch": "torch.stack([C, C, C, k < q]).reshape(2, 2, L, S)",
            "padding of the second batch": "torch.stack([torch.ones(S, dtype=torch.bool), keep])[:, None, None] & C",
        },
    },
    "one head": {
        "causal": {"one mask": "C"},
        "kept": {
            "two heads of the mask's own": "torch.stack([C, C])[None]",
            "two batches of the mask's own": "torch.stack([C, C])[:, None]",
        },
    },
}  # fmt: skip

UNDECIDED = {"a relu of the distance"}
"""Kept although they need not be: what they are made of has no exact model."""


class Inputs(NamedTuple):
    ids: Tensor
    keep: Tensor
    t: Tensor


def masks_of(programs: Iterable[str], queries: Any, keys: Any, inputs: Inputs) -> list[Tensor]:
    """The masks that ``programs`` make, of any rank up to 4; what they are all made of is made once."""
    q, k = torch.arange(queries)[:, None], torch.arange(keys)[None]
    names = {
        "torch": torch, "inf": float("inf"), "LEAST": torch.finfo(torch.float32).min, "L": queries, "S": keys,
        "q": q, "k": k, "C": k <= q, **inputs._asdict(),
    }  # fmt: skip
    with quiet():
        return [eval(program, names) for program in programs]
