"""Before conversion: a proved call is rewritten in torch's own words, and the mask's graph is deleted.

The result is an ordinary graph of ``aten.scaled_dot_product_attention(is_causal=True)`` that any back end can take.
"""

from __future__ import annotations

from passes.graph.lowerings import aten, with_mask, without_mask
from passes.graph.lowerings.lowering import Ability, BackEnd
from passes.graph.strategies import Decision, unproved, why
from passes.proof.calls import AttentionCall
from passes.proof.masks import Proof


def decide(call: AttentionCall, proof: Proof, unproven: str | None, back_end: BackEnd) -> Decision:
    lowering = without_mask(call, proof, back_end - {Ability.NATIVE})
    if lowering is not None:
        return Decision(lowering, why(proof))
    kept = Decision(with_mask(back_end), f"kept; {why(proof)}")
    if unproven == "force":
        kept = Decision(aten.CAUSAL, f"dropped unproved, as asked; {why(proof)}", unproved=True)
    return unproved(call, proof, unproven, kept)
