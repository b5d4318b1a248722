"""A prompt in which every token sees its neighbours alone, in blocks (:mod:`passes.graph.local_attention`).

Legal because the mask was proved to be the window, or the chunks, that the written operation has in its name, for every
index, length and input, and because the queries are the last of the keys: of as many, or, of a window, of more, as a
chunk of a prompt has over its cache.

**The choice**, by microseconds of one layer on an H100 with TensorRT-RTX 1.6, fp16, 8192 tokens.  *Mask*: the native
layer with the whole mask, as a constant, or compared in the network (static; dynamic); *causal*: without the window,
which is wrong; *apart*: every block with a mask of its own, and no causal part:

| heads x size, window | causal | mask | blocks of 128 | 256 | 512 | 1024 | 128 (Mistral: 512) apart |
|---|---|---|---|---|---|---|---|
| 4/1 x 256, 512 (Gemma 3 270M) | 811 | 1256, 299; 460 | **155** | 173 | 207 | | 158 |
| 64/8 x 64, 128 (GPT-OSS) | 2223 | 6532, 1046; - | **374** | 600 | 1041 | | 391 |
| 32/8 x 128, 4096 (Mistral 7B) | 1867 | 4256, 2669; 2294 | | **1750** | 1802 | 1881 | 2379 |

At 2048 tokens blocks of 128 take 57 for 85 with the mask (Gemma 3) and 103 for 195 (GPT-OSS).  So blocks are always
faster, and the fewer masked pairs they compute, down to a kernel's own tiles: :data:`NARROWEST`.  A wider window wants
wider blocks, since every key is copied into width / block of them.

Where lengths are dynamic, a prompt that is no longer than the window has no use for blocks: that costs 253 of 64 tokens
and 398 of 2048 with Mistral's window, and 53 and 227 if the block shrinks to one query; but then its size is dynamic
too, which costs Gemma 3 31 of 155 at 8192 tokens and 27 of 58 at 2048.  So only those of wide windows do
(:data:`WIDE`).
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.graph import local_attention
from passes.graph.lowerings.lowering import Ability, Action, Lowering
from passes.graph.writing import put
from passes.proof.calls import AttentionCall
from passes.proof.mask import Chunked, Window
from passes.proof.masks import Proof, Status

NARROWEST, WIDEST = 128, 256
"""Queries of a block."""
WIDE = 1024
"""Keys of a window above which a block shrinks where it is not needed."""


def block_of(width: int) -> int:
    """Queries of a block, for a window of ``width`` keys."""
    return min(max(width // 16, NARROWEST), WIDEST)


def _is_of_a_prompt(call: AttentionCall, proof: Proof) -> bool:
    """Whether the call has a query for each key, and a batch that is known, in which the blocks take their places."""
    return _has_rows(call, proof) and bool(statically_known_true(_rows(call.query) == _rows(call.key)))


def _is_the_end_of_a_text(call: AttentionCall, proof: Proof) -> bool:
    """Whether the call has at least a key for each query, and more than one query, in a batch that is known."""
    queries, keys = _rows(call.query), _rows(call.key)
    several = isinstance(queries, int) and queries > 1
    return _is_of_a_prompt(call, proof) or (
        _has_rows(call, proof) and several and bool(statically_known_true(keys >= queries))
    )


def _has_rows(call: AttentionCall, proof: Proof) -> bool:
    shapes = [tensor.meta["val"].shape for tensor in (call.query, call.key, call.value)]
    known = all(isinstance(size, int) for shape in shapes for size in (shape[0], shape[1], shape[3]))
    same = bool(statically_known_true(_rows(call.key) == _rows(call.value)))
    return proof.status is Status.PROVED and known and same


def _rows(tensor: Node) -> Any:
    return tensor.meta["val"].shape[2]


def _windowed(graph: Graph, call: AttentionCall) -> None:
    assert isinstance(call.proved, Window)
    width = call.proved.width
    put(graph, call, local_attention.WINDOWED, (width, block_of(width), width > WIDE, call.scale))


def _chunked(graph: Graph, call: AttentionCall) -> None:
    assert isinstance(call.proved, Chunked)
    put(graph, call, local_attention.CHUNKED, (call.proved.size, call.scale))


WINDOWED = Lowering(Action.NATIVE_WINDOW, _windowed, (Window,), Ability.LOCAL, _is_the_end_of_a_text)
CHUNKED = Lowering(Action.NATIVE_CHUNKS, _chunked, (Chunked,), Ability.LOCAL, _is_of_a_prompt)
