"""Before conversion: a proved call is rewritten in torch's own words, and the mask's graph is deleted.

The result is an ordinary graph of ``aten.scaled_dot_product_attention(is_causal=True)`` that any back end can take.
"""

from __future__ import annotations

from passes.errors import RunError
from passes.graph.strategies import Action, Decision, over_cache, why
from passes.proof.calls import AttentionCall
from passes.proof.masks import MaskProof


def decide(call: AttentionCall, proof: MaskProof, unproven: str | None) -> Decision:
    if proof.causal:
        return Decision(Action.REWRITTEN_CAUSAL, why(proof))
    if proof.void:
        return Decision(Action.REWRITTEN_FULL, why(proof))
    if (decision := over_cache(call, proof, unproven)) is not None:
        return decision
    if unproven == "error":
        raise RunError(
            "unproven", f"{call.name}: the mask is not proved causal ({why(proof)}); strategy.unproven=error"
        )
    if unproven == "force":
        return Decision(Action.REWRITTEN_CAUSAL, f"dropped unproved, as asked; {why(proof)}", unproved=True)
    return Decision(Action.NATIVE_MASK, f"kept; {why(proof)}")
