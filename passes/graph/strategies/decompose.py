"""The baseline: every call written out as matmul, add, softmax, matmul."""

from __future__ import annotations

from passes.graph.strategies import Action, Decision
from passes.proof.calls import AttentionCall
from passes.proof.masks import MaskProof


def decide(call: AttentionCall, proof: MaskProof, unproven: str | None) -> Decision:
    return Decision(Action.DECOMPOSED, "as asked")
