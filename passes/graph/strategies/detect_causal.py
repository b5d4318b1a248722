"""At conversion: a mask proved causal becomes the native layer's causal flag, one proved void disappears."""

from __future__ import annotations

from passes.errors import RunError
from passes.graph.strategies import Action, Decision, over_cache, why
from passes.proof.calls import AttentionCall
from passes.proof.masks import MaskProof


def decide(call: AttentionCall, proof: MaskProof, unproven: str | None) -> Decision:
    if proof.causal:
        return Decision(Action.NATIVE_CAUSAL, why(proof))
    if proof.void:
        return Decision(Action.NATIVE_FULL, why(proof))
    if (decision := over_cache(call, proof, unproven)) is not None:
        return decision
    if unproven == "error":
        raise RunError(
            "unproven", f"{call.name}: the mask is not proved causal ({why(proof)}); strategy.unproven=error"
        )
    return Decision(Action.DECOMPOSED if unproven == "decompose" else Action.NATIVE_MASK, why(proof))
