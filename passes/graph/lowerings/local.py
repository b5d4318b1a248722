"""A prompt in which every token sees its neighbours alone, in blocks (:mod:`passes.graph.local_attention`).

Legal because the mask was proved to be the window, or the chunks, that the written operation has in its name, for every
index, length and input, and because there are as many keys as queries, so that row q is the query of key q.

**The choice.**  Microseconds of one layer on an H100 with TensorRT-RTX 1.6, fp16; *mask*: the native layer with the
whole mask, known when the engine is built; *causal*: without the window, which is wrong:

| heads x size, window, length | causal | mask | blocks of a window each |
|---|---|---|---|
| 4/1 x 256, 512, 2048 (Gemma 3 270M) | 97 | 64 | 67 |
| the same, 8192 | 796 | 268 | 195 |
| 64/8 x 64, 128, 2048 (GPT-OSS) | 192 | 140 | 140 |
| the same, 8192 | 2246 | 744 | 501 |
| 32/8 x 128, 4096, 8192 (Mistral 7B) | 1875 | 2328 | 2330 |

So blocks are never much slower, and their mask is one of a block, not of the length squared (1 GiB at 32768 tokens).
A window as wide as Mistral's gains nothing from blocks as wide as itself, in which every query is multiplied with two
windows of keys: there the blocks are narrower (:data:`WIDEST`), and the first window is causal attention, which is
without waste.  Nothing is narrower than :data:`NARROWEST`, which is what a kernel's own tiles are.
"""

from __future__ import annotations

from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.graph import local_attention
from passes.graph.lowerings.lowering import Ability, Action, Lowering
from passes.graph.writing import put
from passes.proof.calls import AttentionCall
from passes.proof.mask import Chunked, Window
from passes.proof.masks import Proof, Status

NARROWEST, WIDEST = 128, 512
"""Queries of a block."""


def block_of(width: int) -> int:
    """Queries of a block, for a window of ``width`` keys."""
    return min(max(width // 8, NARROWEST), WIDEST)


def _is_of_a_prompt(call: AttentionCall, proof: Proof) -> bool:
    """Whether the call has a query for each key, and a batch that is known, in which the blocks take their places."""
    if proof.status is not Status.PROVED:
        return False
    shapes = [tensor.meta["val"].shape for tensor in (call.query, call.key, call.value)]
    known = all(isinstance(size, int) for shape in shapes for size in (shape[0], shape[1], shape[3]))
    return known and all(bool(statically_known_true(shape[2] == shapes[0][2])) for shape in shapes)


def _windowed(graph: Graph, call: AttentionCall) -> None:
    assert isinstance(call.proved, Window)
    width = call.proved.width
    put(graph, call, local_attention.WINDOWED, (width, block_of(width), call.scale))


def _chunked(graph: Graph, call: AttentionCall) -> None:
    assert isinstance(call.proved, Chunked)
    put(graph, call, local_attention.CHUNKED, (call.proved.size, call.scale))


WINDOWED = Lowering(Action.NATIVE_WINDOW, _windowed, (Window,), Ability.LOCAL, _is_of_a_prompt)
CHUNKED = Lowering(Action.NATIVE_CHUNKS, _chunked, (Chunked,), Ability.LOCAL, _is_of_a_prompt)
