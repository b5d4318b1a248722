"""The mask always goes to the native layer's mask input, proved or not."""

from __future__ import annotations

from passes.graph.lowerings import with_mask, without_mask
from passes.graph.lowerings.lowering import BackEnd
from passes.graph.strategies import Decision
from passes.proof.calls import AttentionCall
from passes.proof.masks import Proof


def decide(call: AttentionCall, proof: Proof, unproven: str | None, back_end: BackEnd) -> Decision:
    if call.mask is None and (lowering := without_mask(call, proof, back_end)) is not None:
        return Decision(lowering, "there is no mask")
    return Decision(with_mask(back_end), "as asked, whatever the mask is")
