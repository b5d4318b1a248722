"""Nothing: what the installed Torch-TensorRT does by itself."""

from __future__ import annotations

from passes.graph.blank_rows import every_row_sees_a_key
from passes.graph.lowerings import written_out
from passes.graph.lowerings.lowering import BackEnd
from passes.graph.strategies import Decision
from passes.proof.calls import AttentionCall
from passes.proof.masks import Proof


def decide(call: AttentionCall, proof: Proof, unproven: str | None, back_end: BackEnd) -> Decision:
    reason = "left to Torch-TensorRT"
    if not every_row_sees_a_key(call, proof):
        reason += "; a row that sees no key need not be 0 as in PyTorch"
    return Decision(written_out.UNTOUCHED, reason)
