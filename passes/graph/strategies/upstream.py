"""Nothing: what the installed Torch-TensorRT does by itself."""

from __future__ import annotations

from passes.graph.strategies import Action, Decision, every_row_sees_a_key
from passes.proof.calls import AttentionCall
from passes.proof.masks import MaskProof


def decide(call: AttentionCall, proof: MaskProof, unproven: str | None) -> Decision:
    reason = "left to Torch-TensorRT"
    if not every_row_sees_a_key(call, proof):
        reason += "; a row that sees no key need not be 0 as in PyTorch"
    return Decision(Action.UNTOUCHED, reason)
