"""The proof of what an attention mask is: a class of :mod:`passes.proof.mask`, and what stands behind it.

A float mask, which is added to the scores, attends where it is 0 and blocks where it is -inf or the least number of its
type.  A class is reported only if the solver proves it for every index, every length of the profile and every content
of the run-time inputs.  The proof belongs to the graph and to the profile it was made for.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
import z3
from torch.export import ExportedProgram
from torch.fx import Node

from passes.proof import counterexample
from passes.proof.calls import AttentionCall
from passes.proof.claims import Claims, ancestors
from passes.proof.conditions import CONDITIONS, GIVEN, KEEPING, about
from passes.proof.counterexample import Counterexample
from passes.proof.mask import DROPPABLE, Absent, Arbitrary, Bias, Causal, Full, Mask, Padding, Placed
from passes.proof.second_look import claimed_of, look
from passes.proof.sizes import asserted, symbol_ranges
from passes.proof.symbolic import Evaluator
from passes.proof.terms import FLOATS, Unmodelled, size_expression


class Status(StrEnum):
    """How sure a class is; the values are the words of the report."""

    PROVED = "proved"
    """The class is exact."""
    NOT_PROVED = "not_proved"
    """Nothing is known."""
    ASSUMED = "assumed"
    """The class is exact where the conditions hold, and somebody asserted that they do."""

    def __str__(self) -> str:
        return self.value.replace("_", " ")


@dataclass(frozen=True)
class Proof:
    """The class of one mask and what stands behind it."""

    mask: Mask
    status: Status
    depends_on: tuple[str, ...] = ()
    """The graph inputs that the mask's truth hangs on."""
    conditions: tuple[str, ...] = ()
    """The :data:`CONDITIONS` on those inputs under which the mask is proved droppable; empty where none are known."""
    conditional: Mask | None = None
    """What the mask is where the conditions hold."""
    reason: str = ""
    """Why, in a clause for people."""
    looks: int = 0
    """On how many inputs the mask's graph was run and found to be what was proved (:mod:`passes.proof.second_look`)."""
    disagreement: str = ""
    """Where prover and program differ, which is an error of ours: the mask is then :class:`Arbitrary`."""
    counterexample: Counterexample | None = None
    """Inputs on which the mask is not causal, checked by running the mask's graph on them."""
    profile: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def causal(self) -> bool:
        """Whether the mask is torch's ``is_causal``: proved, or assumed as asked."""
        return isinstance(self.mask, Causal) and self.status is not Status.NOT_PROVED

    @property
    def void(self) -> bool:
        """Whether the mask blocks nothing: proved, or assumed as asked."""
        return isinstance(self.mask, Absent | Full) and self.status is not Status.NOT_PROVED

    def __str__(self) -> str:
        lines = [f"{self.mask}, {self.status}"]
        if self.mask.predicate and self.status is Status.PROVED:
            lines.append(f"mask[b, h, q, k] == ({self.mask.predicate}) for every b, h, q, k and every input")
        if self.profile:
            sizes = ", ".join(f"{low} <= {symbol} <= {high}" for symbol, (low, high) in self.profile.items())
            lines.append(f"at every size with {sizes}")
        droppable = isinstance(self.mask, DROPPABLE)
        lines += [self.reason] if self.reason and (not droppable or self.status is Status.ASSUMED) else []
        lines += [f"depends on {', '.join(self.depends_on)}"] if self.depends_on else []
        if self.conditions and self.status is not Status.ASSUMED:
            lines.append(f"may be dropped where {' and '.join(CONDITIONS[name] for name in self.conditions)}")
        lines += [self.counterexample.text] if self.counterexample else []
        return "\n  ".join(lines)


class Prover:
    """Proves each distinct mask of one graph once, however many calls share it."""

    def __init__(
        self,
        ranges: dict[str, tuple[int, int]],
        inputs: frozenset[str],
        constants: dict[str, torch.Tensor] | None = None,
        assume: frozenset[str] = frozenset(),
        asserted: Collection[str] = (),
    ) -> None:
        """``ranges``: inclusive bounds of the shape symbols; ``inputs``: names of the run-time inputs;
        ``constants``: the lifted constants by the name of their placeholder; ``assume``: the :data:`CONDITIONS`
        that hold, says the user; ``asserted``: nodes of which only an assertion says what they are, see
        :func:`passes.proof.sizes.asserted`."""
        self.asserted = frozenset(asserted)
        self.ranges = ranges
        self.inputs = inputs
        self.constants = constants or {}
        self.assume = assume
        self._known: dict[tuple[Any, ...], Proof] = {}

    def prove(self, call: AttentionCall) -> Proof:
        """The class of the call's mask; ``seconds`` is 0 where an earlier call has paid for the proof."""
        if call.mask is None:
            said = Causal() if call.is_causal else Absent()
            return Proof(said, Status.PROVED, reason="the call says so itself", profile=self.ranges)
        # The proof depends on the mask and on the scores' sizes; each layer has a query of its own.
        sizes = (*call.query.meta["val"].shape[:-1], call.key.meta["val"].shape[-2])
        key = (call.mask, call.is_causal, *(size_expression(size) for size in sizes))
        if key not in self._known:
            started = time.perf_counter()
            proof = replace(self._looked_at(call, self._prove(call, call.mask)), profile=self.ranges)
            self._known[key] = proof
            return replace(proof, seconds=round(time.perf_counter() - started, 4))
        return self._known[key]

    def _prove(self, call: AttentionCall, mask: Node) -> Proof:
        value = mask.meta["val"]
        reached = tuple(sorted(ancestors([mask]) & self.inputs))
        if call.is_causal:
            return _unknown(reached, "both a mask and is_causal were given")
        if self.asserted and self.asserted & ancestors([mask], through_sizes=True):
            reason = "made of a number that only an assertion in the graph ties to a size"
            return _unknown(reached, reason)
        ranks = {node.meta["val"].dim() for node in (call.query, call.key)}
        if ranks != {4}:
            return _unknown(reached, f"attention over {max(ranks)}-D tensors")
        if value.dtype not in (torch.bool, *FLOATS) or value.dim() > 4:
            return _unknown(reached, f"a {value.dim()}-D mask of {value.dtype}")
        try:
            claims = Claims(Evaluator(self.ranges, self.constants), call)
            found = claims.classify()
            depends_on = claims.depends_on(self.inputs)
            if isinstance(found.mask, Arbitrary | Padding) and depends_on:
                bounded = Claims(Evaluator(self.ranges, self.constants, bounded=True), call)
                found = bounded.of_bounded_inputs() or found
            kept, reason = found
            if isinstance(kept, DROPPABLE):
                return Proof(kept, Status.PROVED, reason=reason)
            conditions, droppable = self._conditions(call, depends_on)
        except (Unmodelled, z3.Z3Exception, RecursionError) as error:
            return _unknown(reached, f"could not be evaluated: {error}")
        if isinstance(kept, Padding) and not depends_on:  # a condition on keys that no input is behind
            kept, reason = Arbitrary(), f"is not proved causal{reason.removeprefix('causal')}"
        if droppable is not None and self.assume.issuperset(conditions):
            asserted = " and ".join(CONDITIONS[condition] for condition in conditions)
            reason = f"as asserted, {asserted}; without that it is {kept}: {reason}"
            return Proof(droppable, Status.ASSUMED, depends_on, conditions, reason=reason)
        status = Status.NOT_PROVED if isinstance(kept, Bias | Arbitrary) else Status.PROVED
        witness = counterexample.find(call, *claims.search(), self.inputs)
        return Proof(kept, status, depends_on, conditions, droppable, reason, counterexample=witness)

    def _looked_at(self, call: AttentionCall, proof: Proof) -> Proof:
        """``proof``, if PyTorch makes that mask of the inputs that :mod:`passes.proof.second_look` tries."""
        claimed = claimed_of(proof.mask)
        if proof.status is Status.NOT_PROVED or claimed is None:
            return proof
        assumed = proof.conditions if proof.status is Status.ASSUMED else ()
        reads = about(call, proof.depends_on)
        given = {name: KEEPING[condition] for condition in assumed for name in reads[condition]}
        seen = look(call, self.constants, self.ranges, claimed, given, bounded=isinstance(proof.mask, Placed))
        if not seen.disagreement:
            return replace(proof, looks=seen.runs)
        reason = f"the prover says {proof.mask}, the program says otherwise (please report it): {seen.disagreement}"
        kept = _unknown(proof.depends_on, reason)
        return replace(kept, looks=seen.runs, disagreement=f"{call.name}: {reason}; the mask is kept")

    def _conditions(self, call: AttentionCall, depends_on: tuple[str, ...]) -> tuple[tuple[str, ...], Mask | None]:
        """The fewest conditions under which the mask is droppable, and its class then; nothing where none help."""
        assert call.mask is not None
        placeholders = {node.name: node for node in call.mask.graph.nodes if node.op == "placeholder"}
        reads = about(call, depends_on)
        possible = [condition for condition, names in reads.items() if names]
        for count in range(1, len(possible) + 1):
            for conditions in itertools.combinations(possible, count):
                evaluator = Evaluator(self.ranges, self.constants)
                for condition in conditions:
                    for name in reads[condition]:
                        evaluator.given[name] = GIVEN[condition](evaluator, placeholders[name])
                if (droppable := Claims(evaluator, call).droppable()) is not None:
                    return conditions, droppable
        return (), None


def _unknown(depends_on: tuple[str, ...], reason: str) -> Proof:
    return Proof(Arbitrary(), Status.NOT_PROVED, depends_on, reason=reason)


def constants_of(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Lifted constants and buffers that nothing writes, by the name of their placeholder."""
    signature = program.graph_signature
    written = set(signature.buffers_to_mutate.values())
    found = {}
    for placeholder, name in {
        **signature.inputs_to_lifted_tensor_constants,
        **signature.inputs_to_buffers,
    }.items():
        tensor = program.constants.get(name, program.state_dict.get(name))
        if isinstance(tensor, torch.Tensor) and name not in written:
            found[placeholder] = tensor
    return found


def prover_of(program: ExportedProgram, assume: Collection[str] = ()) -> Prover:
    """The prover of the prepared ``program``."""
    signature = program.graph_signature
    state = [
        placeholder
        for placeholder, name in signature.inputs_to_buffers.items()
        if name in signature.buffers_to_mutate.values()
    ]
    inputs = frozenset((*signature.user_inputs, *state))
    return Prover(symbol_ranges(program), inputs, constants_of(program), frozenset(assume), asserted(program.graph))
