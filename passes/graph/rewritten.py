"""What became of a program: the program, a row for each attention call, a row for each pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from torch.export import ExportedProgram

from passes.graph.passes import Attention
from passes.graph.records import CallRecord, PassRecord


@dataclass(frozen=True)
class Rewritten:
    """``program`` is functional and runs as it is; lowering must decompose
    :data:`passes.graph.rewrite.DECOMPOSITIONS` on the way."""

    program: ExportedProgram
    calls: list[CallRecord]
    passes: list[PassRecord]
    assumed: list[str]
    """The conditions on whose word a mask was dropped: outside of them ``program`` is wrong."""
    written_out: list[str] = field(default_factory=list)
    """Attention that is no call, but products and these softmaxes: it stays so, and no mask of it is looked at."""

    @property
    def narrowed(self) -> int:
        """Operations that run over fewer rows, since the others' are not read (:mod:`passes.graph.row_narrowing`)."""
        return sum(each.changed for each in self.passes if each.name == "narrow_rows")

    def describe(self) -> dict[str, Any]:
        """The report's ``attention`` section."""
        return {
            "calls": [asdict(call) for call in self.calls],
            "passes": [asdict(each) for each in self.passes],
            "summary": {
                "by_mask": dict(Counter(call.mask for call in self.calls)),
                "by_action": dict(Counter(call.action for call in self.calls)),
                "assumed": self.assumed,
                "proof_seconds": round(sum(call.seconds for call in self.calls), 4),
                "narrowed": self.narrowed,
                "written_out": self.written_out,
            },
        }


def record(attention: Attention) -> CallRecord:
    """The row of one call once every pass is done with it."""
    call, proof, decision = attention.call, attention.proof, attention.decision
    return CallRecord(
        index=call.index,
        name=call.name,
        op=call.op,
        mask=str(proof.mask),
        proof="unproved" if decision.unproved else proof.status.value,
        depends_on=proof.depends_on,
        conditions=proof.conditions,
        could_go=attention.could_go,
        counterexample=None if proof.counterexample is None else proof.counterexample.describe(),
        action=decision.lowering.action.value,
        reason=decision.reason,
        unproved=decision.unproved,
        looks=proof.looks,
        disagreement=proof.disagreement,
        native_gqa=attention.native_gqa,
        profile=dict(proof.profile),
        seconds=proof.seconds,
    )
