"""At conversion: a mask proved causal becomes the native layer's causal flag, one proved void disappears."""

from __future__ import annotations

from passes.graph.lowerings import with_mask, without_mask, written_out
from passes.graph.lowerings.lowering import BackEnd
from passes.graph.strategies import Decision, unproved, why
from passes.proof.calls import AttentionCall
from passes.proof.masks import Proof


def decide(call: AttentionCall, proof: Proof, unproven: str | None, back_end: BackEnd) -> Decision:
    lowering = without_mask(call, proof, back_end)
    if lowering is not None:
        return Decision(lowering, why(proof))
    kept = written_out.DECOMPOSED if unproven == "decompose" else with_mask(back_end)
    return unproved(call, proof, unproven, Decision(kept, why(proof)))
