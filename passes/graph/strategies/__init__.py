"""What is done about the mask of each attention call.

A strategy is one module with one function, ``decide(call, proof, unproven) -> Decision``; adding one is adding a
module here and a YAML file.  :mod:`passes.graph.driver` carries the decisions out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.graph.cache_ops import update_behind
from passes.proof.calls import AttentionCall
from passes.proof.masks import PROVED, MaskProof


class Action(Enum):
    """What becomes of an attention call; the values are the words of the report."""

    NATIVE_CAUSAL = "native_causal"
    """The native layer with its causal flag."""
    NATIVE_FULL = "native_full"
    """The native layer without mask."""
    NATIVE_MASK = "native_mask"
    """The native layer with the mask as its input."""
    REWRITTEN_CAUSAL = "rewritten_causal"
    """``scaled_dot_product_attention(is_causal=True)`` in the graph; converted to the native layer's causal flag."""
    REWRITTEN_FULL = "rewritten_full"
    """``scaled_dot_product_attention`` without mask in the graph."""
    CACHED = "cached"
    """Attention of one token over a cache of fixed capacity, in which its position says what it sees."""
    DECOMPOSED = "decomposed"
    """Written out as matmul, add, softmax, matmul."""
    UNTOUCHED = "untouched"
    """Left to the installed Torch-TensorRT; a row that sees no key is then not 0 as in PyTorch, but what its layers
    make of it."""


KEEPS_MASK = frozenset({Action.NATIVE_MASK, Action.DECOMPOSED, Action.UNTOUCHED})
"""Actions that are right for every mask, since they apply it."""


@dataclass(frozen=True)
class Decision:
    action: Action
    reason: str
    unproved: bool = False
    """The mask is dropped although nothing proves that it may be."""


def over_cache(call: AttentionCall, proof: MaskProof, unproven: str | None) -> Decision | None:
    """What is done about a call over a KV cache of fixed capacity, or of one query over keys that are made of what such
    a cache holds (DeepSeek keeps latents); None for any other call.

    The mask goes where it was proved to be ``k <= q + position[b]`` with the position at which row b of the cache is
    written.  Otherwise it is applied in the written-out form: the native layer with a mask and a query length of 1
    does not build (TensorRT-RTX 1.4).
    """
    update = update_behind(call.key)
    one = call.query.meta["val"].shape[2] == 1
    written_out = None if unproven == "error" else Decision(Action.DECOMPOSED, why(proof))
    if update is None:
        return written_out if one is True else None
    row = "b" if update.args[0].meta["val"].shape[0] > 1 else 0  # type: ignore[union-attr]
    offset = (str(update.args[2]), (row,))
    if proof.proof == PROVED and proof.offset == offset and one:
        return Decision(Action.CACHED, why(proof))
    return written_out


SEES_FIRST_KEY = ("none", "full", "causal")
SEES_ITSELF = ("causal_lower_right", "sliding_window", "chunked", "packed")


def every_row_sees_a_key(call: AttentionCall, proof: MaskProof) -> bool:
    """Whether no row of the call is blocked from every key, by the class of its mask (:mod:`passes.proof.masks`).

    A row that sees none gives 0 in PyTorch, and anything in TensorRT's softmax and attention layers.
    """
    queries, keys = (tensor.meta["val"].shape[-2] for tensor in (call.query, call.key))
    if proof.proof != PROVED:
        return False
    if proof.mask in SEES_FIRST_KEY:
        return bool(statically_known_true(keys >= 1))
    return proof.mask in SEES_ITSELF and bool(statically_known_true(keys >= queries))


Strategy = Callable[[AttentionCall, MaskProof, "str | None"], Decision]


def strategy(name: str) -> Strategy:
    """The strategy of that name: the ``decide`` of the module ``passes.graph.strategies.NAME``."""
    decide: Strategy = importlib.import_module(f"{__name__}.{name}").decide
    return decide


def why(proof: MaskProof) -> str:
    """The proof in one clause, for a decision's reason."""
    return f"{proof.mask} {proof.proof.replace('_', ' ')}" + (f": {proof.reason}" if proof.reason else "")
