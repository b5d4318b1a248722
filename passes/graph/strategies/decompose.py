"""The baseline: every call written out as matmul, add, softmax, matmul."""

from __future__ import annotations

from passes.graph.lowerings import written_out
from passes.graph.lowerings.lowering import BackEnd
from passes.graph.strategies import Decision
from passes.proof.calls import AttentionCall
from passes.proof.masks import Proof


def decide(call: AttentionCall, proof: Proof, unproven: str | None, back_end: BackEnd) -> Decision:
    return Decision(written_out.DECOMPOSED, "as asked")
