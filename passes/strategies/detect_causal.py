"""At conversion: a mask proved causal becomes the native layer's causal flag, one proved void disappears."""

from __future__ import annotations

from passes.attention import AttentionCall
from passes.errors import RunError
from passes.masks import MaskProof
from passes.strategies import Action, Decision, over_cache, why


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
