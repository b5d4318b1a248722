"""Carries a strategy's decisions out on an exported program, and says for each call what was done and why.

Why the rewrites are legal: a mask is dropped only where it was proved equal to the predicate that replaces it for
every index, every length of the profile and every content of the inputs (:mod:`passes.proof.masks`), or every content
that keeps a condition which the user asserted, and ``repeat_kv`` only where it was proved to be the repetition that
grouped-query attention means (:func:`passes.proof.calls.unrepeated`).  Rows that nothing reads are left out by
:mod:`passes.graph.row_narrowing`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from passes.graph import ops
from passes.graph.lowerings import REWRITES
from passes.graph.row_narrowing import narrow
from passes.graph.scale import fold_scale
from passes.graph.strategies import KEEPS_MASK, Action, Decision, every_row_sees_a_key, strategy
from passes.proof.calls import AttentionCall, find_calls, use_native_gqa
from passes.proof.masks import ASSUMED, MaskProof, prover_of

DECOMPOSITIONS = {ops.DECOMPOSED: ops.written_out, ops.BLANKED: ops.without_unseeing}


@dataclass(frozen=True)
class CallRecord:
    """One row of the report's table of attention calls."""

    index: int
    name: str
    op: str
    mask: str
    proof: str
    depends_on: list[str]
    conditions: list[str]
    counterexample: dict[str, Any] | None
    action: str
    reason: str
    unproved: bool
    looks: int
    """On how many inputs the mask's graph was run to check the proof."""
    disagreement: str
    """Where it was not what was proved; the mask is then kept."""
    native_gqa: bool
    scale: str
    """Where the softmax scale went."""
    profile: dict[str, tuple[int, int]]
    seconds: float


@dataclass(frozen=True)
class Rewritten:
    """The program after the strategy and what became of each call.

    ``program`` is functional and runs as it is; lowering must decompose ``DECOMPOSITIONS`` on the way.
    """

    program: ExportedProgram
    calls: list[CallRecord]
    narrowed: int = 0
    """Operations that run over fewer rows, since the others' are not read (:mod:`passes.graph.row_narrowing`)."""

    @property
    def assumed(self) -> list[str]:
        """The conditions on whose word a mask was dropped: outside of them ``program`` is wrong."""
        dropped = [call for call in self.calls if call.proof == ASSUMED and Action(call.action) not in KEEPS_MASK]
        return sorted({condition for call in dropped for condition in call.conditions})

    def describe(self) -> dict[str, Any]:
        """The report's ``attention`` section."""
        return {
            "calls": [asdict(call) for call in self.calls],
            "summary": {
                "by_mask": dict(Counter(call.mask for call in self.calls)),
                "by_action": dict(Counter(call.action for call in self.calls)),
                "assumed": self.assumed,
                "proof_seconds": round(sum(call.seconds for call in self.calls), 4),
                "narrowed": self.narrowed,
            },
        }


IN_ATEN = {
    Action.NATIVE_CAUSAL: Action.REWRITTEN_CAUSAL,
    Action.NATIVE_FULL: Action.REWRITTEN_FULL,
    Action.NATIVE_MASK: Action.UNTOUCHED,
}
"""What says the same in aten's own words."""


def apply_strategy(
    program: ExportedProgram,
    name: str,
    unproven: str | None = None,
    assume: Collection[str] = (),
    in_aten: bool = False,
) -> Rewritten:
    """Prove every mask of the prepared ``program`` and rewrite its attention calls by strategy ``name``; ``in_aten``:
    a call becomes one of aten's where aten has a word for it.

    ``assume`` names the :data:`passes.proof.conditions.CONDITIONS` that hold for every input, says the user.

    ``program`` is changed in place; use what is returned.  Raises :class:`passes.errors.RunError` of kind
    ``unproven`` where the strategy was told to, and of kind ``no_attention`` for a graph without attention ops.
    """
    calls = find_calls(program.graph_module)
    prover = prover_of(program, assume)
    decide = strategy(name)
    records: list[CallRecord] = []
    for call in calls:
        proof = prover.prove(call)
        decision = decide(call, proof, unproven)
        if in_aten:
            decision = replace(decision, action=IN_ATEN.get(decision.action, decision.action))
        key, value, scale = call.key, call.value, "in the graph"
        if decision.action not in (Action.UNTOUCHED, Action.DECOMPOSED):
            key, value = use_native_gqa(call, prover.ranges)
            call, scale = _without_scale(program, call)
        records.append(_record(call, proof, decision, key is not call.key, scale))
        if proof.proof == ASSUMED and decision.action not in KEEPS_MASK:
            call = replace(call, mask=None)  # no evidence for every input, so it does not stay beside the claim
        call = replace(call, sees_keys=every_row_sees_a_key(call, proof))
        REWRITES[decision.action](program.graph_module.graph, call, key, value)
    left_alone = all(Action(record.action) is Action.UNTOUCHED for record in records)
    narrowed = 0 if left_alone else narrow(program.graph_module)
    program.graph_module.graph.eliminate_dead_code(_keeps_alive)
    program.graph_module.graph.lint()
    program.graph_module.recompile()
    return Rewritten(program, records, narrowed)


def _keeps_alive(node: Node) -> bool:
    """Whether ``node`` stays although nothing reads it: not an assertion about a tensor that nothing else reads."""
    metadata = torch.ops.aten._assert_tensor_metadata.default
    if node.target is metadata:
        return any(user.target is not metadata for user in node.all_input_nodes[0].users)
    return node.is_impure()


def _without_scale(program: ExportedProgram, call: AttentionCall) -> tuple[AttentionCall, str]:
    """``call`` with its scale folded into the weights behind the query, where that can be done."""
    if call.scale == 1.0:
        return call, "none"
    obstacle = fold_scale(program, call.node, call.query, call.scale)
    if obstacle is not None:
        return call, f"in the graph: {obstacle}"
    return replace(call, scale=1.0), "in the weights"


def _record(call: AttentionCall, proof: MaskProof, decision: Decision, native_gqa: bool, scale: str) -> CallRecord:
    return CallRecord(
        index=call.index,
        name=call.name,
        op=call.op,
        mask=proof.mask,
        proof="unproved" if decision.unproved else proof.proof,
        depends_on=list(proof.depends_on),
        conditions=list(proof.conditions),
        counterexample=None if proof.counterexample is None else proof.counterexample.describe(),
        action=decision.action.value,
        reason=decision.reason,
        unproved=decision.unproved,
        looks=proof.looks,
        disagreement=proof.disagreement,
        native_gqa=native_gqa,
        scale=scale,
        profile=dict(proof.profile),
        seconds=proof.seconds,
    )
