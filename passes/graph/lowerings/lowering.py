"""What a lowering is: one way to write an attention call anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, StrEnum

from torch.fx import Graph

from passes.proof.calls import AttentionCall
from passes.proof.mask import Mask
from passes.proof.masks import Proof


class Action(StrEnum):
    """What becomes of an attention call; the values are the words of the report."""

    NATIVE_CAUSAL = "native_causal"
    """The native layer with its causal flag: upper-left, or lower-right where the mask was proved that."""
    NATIVE_FULL = "native_full"
    """The native layer without mask."""
    NATIVE_MASK = "native_mask"
    """The native layer with the mask as its input."""
    REWRITTEN_CAUSAL = "rewritten_causal"
    """``scaled_dot_product_attention(is_causal=True)`` in the graph; converted to the native layer's causal flag."""
    REWRITTEN_FULL = "rewritten_full"
    """``scaled_dot_product_attention`` without mask in the graph."""
    NATIVE_WINDOW = "native_window"
    """The native layer over blocks of queries, each with the keys that a window lets them see."""
    NATIVE_CHUNKS = "native_chunks"
    """The native layer with its causal flag, over each chunk by itself."""
    CACHED = "cached"
    """Attention of one token over a cache of fixed capacity, in which its position says what it sees."""
    DECOMPOSED = "decomposed"
    """Written out as matmul, add, softmax, matmul."""
    UNTOUCHED = "untouched"
    """Left to the installed Torch-TensorRT; a row that sees no key is then not 0 as in PyTorch, but what its layers
    make of it."""


class Ability(Enum):
    """What a back end can do with an attention call."""

    NATIVE = "the native layer, by our converter: proved_attention::native"
    CACHE = "one token over a cache of fixed capacity, by our converter: proved_attention::cached"
    LOCAL = "windows and chunks, by our converter: proved_attention::windowed and ::chunked"
    ATEN = "what aten has a word for"


BackEnd = frozenset[Ability]
OURS: BackEnd = frozenset(Ability)
"""Torch-TensorRT with our converters."""
ANY: BackEnd = frozenset([Ability.ATEN])
"""Whatever takes a graph of aten operations."""


def _always(call: AttentionCall, proof: Proof) -> bool:
    return True


@dataclass(frozen=True)
class Lowering:
    """One way to write a call anew; why it is legal is said where ``write`` is."""

    action: Action
    write: Callable[[Graph, AttentionCall], None]
    """Puts it in the call's place."""
    masks: tuple[type[Mask], ...]
    """It is right for masks that are proved to be one of these; :class:`Mask` itself: for every mask, since it applies
    it."""
    needs: Ability
    fits: Callable[[AttentionCall, Proof], bool] = _always
    """What else must be so."""
    own_words: bool = True
    """Whether the call is written in one of our forms, which take grouped heads as they are."""

    @property
    def applies_mask(self) -> bool:
        return self.masks == (Mask,)

    def takes(self, call: AttentionCall, proof: Proof, back_end: BackEnd) -> bool:
        """Whether ``call``, whose mask is ``proof``, may be written so for ``back_end``."""
        return self.needs in back_end and isinstance(proof.mask, self.masks) and self.fits(call, proof)
