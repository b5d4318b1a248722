"""The passes over a program, in the order in which they run, one after another and each over the whole program.

A pass takes the :class:`Work` and returns how many calls or operations it changed.  Why they are legal: a mask is
dropped only where it was proved equal to the predicate that replaces it for every index, every length of the profile
and every content of the inputs (:mod:`passes.proof.masks`), or every content that keeps a condition which the user
asserted; ``repeat_kv`` only where it was proved to be the repetition that grouped-query attention means
(:func:`passes.proof.calls.unrepeated`); for rows that nothing reads see :mod:`passes.graph.row_narrowing`.  The softmax
scale stays a part of the call, and what a call becomes applies it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from passes.graph.blank_rows import every_row_sees_a_key
from passes.graph.complex_numbers import write_out
from passes.graph.driver import Pass
from passes.graph.lowerings import without_mask
from passes.graph.lowerings.lowering import Action, BackEnd
from passes.graph.prepare import prepare
from passes.graph.row_narrowing import narrow
from passes.graph.strategies import Decision, Strategy
from passes.graph.writing import allow_any_layout
from passes.proof.calls import AttentionCall, find_calls, native_gqa, written_out
from passes.proof.masks import Proof, Prover, Status, prover_of


@dataclass
class Attention:
    """One attention call while it is worked on."""

    call: AttentionCall
    proof: Proof
    decision: Decision
    could_go: bool
    """The mask stays, and would go if the conditions of its proof were asserted."""
    native_gqa: bool = False
    """Whether keys and values are no longer repeated for each query head."""

    @property
    def is_assumed(self) -> bool:
        """Whether the mask is dropped on somebody's word."""
        return self.proof.status is Status.ASSUMED and not self.decision.lowering.applies_mask


@dataclass
class Work:
    """One program while it is worked on, and what was asked."""

    program: ExportedProgram
    decide: Strategy
    unproven: str | None
    assume: Collection[str]
    back_end: BackEnd
    needed: bool = True
    """Whether a graph without attention calls is an error."""
    written_out: list[str] = field(default_factory=list)
    """Softmaxes of attention that is no call."""
    attention: list[Attention] = field(default_factory=list)
    prover: Prover = field(init=False)


def prepared(work: Work) -> int:
    """A functional form with attention intact."""
    work.program = prepare(work.program)
    return 0


def proved(work: Work) -> int:
    """What each mask is, and what is to become of its call."""
    work.prover = prover_of(work.program, work.assume)
    work.written_out = written_out(work.program.graph_module)
    for call in find_calls(work.program.graph_module, work.needed):
        proof = work.prover.prove(call)
        decision = work.decide(call, proof, work.unproven, work.back_end)
        could_go = decision.lowering.applies_mask and _goes_if_asserted(call, proof, work.back_end)
        work.attention.append(Attention(call, proof, decision, could_go))
    return 0


def _goes_if_asserted(call: AttentionCall, proof: Proof, back_end: BackEnd) -> bool:
    if proof.conditional is None:
        return False
    asserted = replace(proof, mask=proof.conditional, status=Status.ASSUMED)
    return without_mask(call, asserted, back_end) is not None


def complex_written_out(work: Work) -> int:
    """Complex numbers as two real ones."""
    return write_out(work.program.graph_module)


def heads_grouped(work: Work) -> int:
    """Keys and values without ``repeat_kv``."""
    for each in work.attention:
        each.native_gqa = each.decision.lowering.own_words and native_gqa(each.call, work.prover.ranges)
    return sum(each.native_gqa for each in work.attention)


def lowered(work: Work) -> int:
    """Each call written anew."""
    for each in work.attention:
        call = each.call
        if each.is_assumed:
            call = replace(call, mask=None)  # no evidence for every input, so it does not stay beside the claim
        call = replace(call, sees_keys=every_row_sees_a_key(call, each.proof), proved=each.proof.mask)
        each.decision.lowering.write(work.program.graph_module.graph, call)
    written = sum(each.decision.lowering.action is not Action.UNTOUCHED for each in work.attention)
    if written:
        allow_any_layout(work.program.graph_module.graph)
    return written


def rows_narrowed(work: Work) -> int:
    """Rows that nothing reads are not computed."""
    left_alone = all(each.decision.lowering.action is Action.UNTOUCHED for each in work.attention)
    return 0 if left_alone else narrow(work.program.graph_module)


def dead_code_removed(work: Work) -> int:
    """What nothing reads, the graphs of dropped masks above all."""
    graph = work.program.graph_module.graph
    before = len(graph.nodes)
    graph.eliminate_dead_code(_keeps_alive)
    return before - len(graph.nodes)


def _keeps_alive(node: Node) -> bool:
    """Whether ``node`` stays although nothing reads it: not an assertion about a tensor that nothing else reads."""
    metadata = torch.ops.aten._assert_tensor_metadata.default
    if node.target is metadata:
        return any(user.target is not metadata for user in node.all_input_nodes[0].users)
    return node.is_impure()


PASSES: tuple[Pass[Work], ...] = (
    Pass("prepare", prepared),
    Pass("write_out_complex", complex_written_out),
    Pass("prove", proved),
    Pass("group_heads", heads_grouped, optional=True),
    Pass("lower_attention", lowered),
    Pass("narrow_rows", rows_narrowed, optional=True),
    Pass("remove_dead_code", dead_code_removed),
)
