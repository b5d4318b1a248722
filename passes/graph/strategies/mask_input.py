"""The mask always goes to the native layer's mask input, proved or not."""

from __future__ import annotations

from passes.graph.strategies import Action, Decision
from passes.proof.calls import AttentionCall
from passes.proof.masks import MaskProof


def decide(call: AttentionCall, proof: MaskProof, unproven: str | None) -> Decision:
    if call.mask is None:
        return Decision(Action.NATIVE_CAUSAL if call.is_causal else Action.NATIVE_FULL, "there is no mask")
    return Decision(Action.NATIVE_MASK, "as asked, whatever the mask is")
