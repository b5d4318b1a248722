"""What an attention mask is, and the proof.

A mask is a predicate over (batch b, head h, query q, key k): may query q attend to key k?  With L queries and
S keys, and every quantifier over the whole range of the profile:

========================  ==========================================================================
none                      there is no mask
full                      always true
causal                    k <= q (upper-left, torch's ``is_causal``)
causal_lower_right        k <= q + S - L
sliding_window            k <= q and q - k < w for one constant w that bites within the range
padding                   k <= q and a condition on (b, k) that hangs on run-time inputs
arbitrary                 none of the above could be proved
========================  ==========================================================================

A class is reported only if the solver proves it for every index, every length of the profile and every
content of the run-time inputs.  The proof belongs to the graph and to the profile it was made for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import z3
from torch.fx import Node

from passes.attention import AttentionCall
from passes.counterexample import Counterexample
from passes.symbolic import Evaluator
from passes.terms import Term, Unmodelled, size_expression

PROVED = "proved"
NOT_PROVED = "not_proved"
ASSUMED = "assumed"

CONDITIONS = {
    "contiguous_positions": "positions rise by one from token to token",
    "no_padding": "the attention mask is all ones",
}
"""Conditions on run-time inputs that a person can assert (``strategy.assume``) and a runtime can check."""


@dataclass(frozen=True)
class MaskProof:
    """The class of one mask and what stands behind it."""

    mask: str
    proof: str
    """``proved``: the class is exact.  ``not_proved``: nothing is known.  ``assumed``: the class is exact where the
    ``conditions`` hold, and somebody asserted that they do."""
    depends_on: tuple[str, ...] = ()
    """The graph inputs that the mask's truth hangs on."""
    conditions: tuple[str, ...] = ()
    """The :data:`CONDITIONS` on those inputs under which the mask is proved droppable; empty where none are known."""
    reason: str = ""
    counterexample: Counterexample | None = None
    """Inputs on which the mask is not causal, checked by running the mask's graph on them."""
    profile: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def causal(self) -> bool:
        """Whether the mask is torch's ``is_causal``: proved, or assumed as asked."""
        return self.mask == "causal" and self.proof in (PROVED, ASSUMED)

    @property
    def void(self) -> bool:
        """Whether the mask blocks nothing: proved, or assumed as asked."""
        return self.mask in ("none", "full") and self.proof in (PROVED, ASSUMED)


class Prover:
    """Proves each distinct mask of one graph once, however many calls share it."""

    def __init__(
        self,
        ranges: dict[str, tuple[int, int]],
        inputs: frozenset[str],
        constants: dict[str, torch.Tensor] | None = None,
        assume: frozenset[str] = frozenset(),
    ) -> None:
        """``assume``: the :data:`CONDITIONS` that hold, says the user.  ``ranges``: inclusive bounds of the shape symbols; ``inputs``: names of the run-time inputs;
        ``constants``: the lifted constants by the name of their placeholder."""
        self.ranges = ranges
        self.inputs = inputs
        self.constants = constants or {}
        self.assume = assume
        self._known: dict[tuple[Any, ...], MaskProof] = {}

    def prove(self, call: AttentionCall) -> MaskProof:
        """The class of the call's mask; ``seconds`` is 0 where an earlier call has paid for the proof."""
        if call.mask is None:
            kind = "causal" if call.is_causal else "none"
            return MaskProof(kind, PROVED, reason="the call says so itself", profile=self.ranges)
        # The proof depends on the mask and on the scores' sizes; each layer has a query of its own.
        batch, heads, queries = call.query.meta["val"].shape[:3]
        sizes = (batch, heads, queries, call.key.meta["val"].shape[2])
        key = (call.mask, call.is_causal, *(size_expression(size) for size in sizes))
        if key not in self._known:
            started = time.perf_counter()
            proof = replace(self._classify(call), profile=self.ranges)
            self._known[key] = proof
            return replace(proof, seconds=round(time.perf_counter() - started, 4))
        return self._known[key]

    def _classify(self, call: AttentionCall) -> MaskProof:
        mask = call.mask
        assert mask is not None
        value = mask.meta["val"]
        if call.is_causal:
            return MaskProof("arbitrary", NOT_PROVED, reason="both a mask and is_causal were given")
        if value.dtype != torch.bool or value.dim() > 4:
            return MaskProof(
                "arbitrary", NOT_PROVED, self._reached(mask), reason=f"a {value.dim()}-D mask of {value.dtype}"
            )
        evaluator = Evaluator(self.ranges, self.constants)
        try:
            return _Claims(evaluator, call).classify(self.inputs)
        except (Unmodelled, z3.Z3Exception) as error:
            return MaskProof("arbitrary", NOT_PROVED, self._reached(mask), reason=f"could not be evaluated: {error}")

    def _reached(self, mask: Node) -> tuple[str, ...]:
        return tuple(sorted(_ancestors([mask]) & self.inputs))


def _ancestors(nodes: list[Node]) -> set[str]:
    """Names of ``nodes`` and of everything that they are computed from."""
    pending, seen = list(nodes), set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return {node.name for node in seen}


class _Claims:
    """The claims about one mask, at one symbolic position."""

    def __init__(self, evaluator: Evaluator, call: AttentionCall) -> None:
        assert call.mask is not None
        self.evaluator, self.mask = evaluator, call.mask
        self.b, self.h, self.q, self.k = z3.Ints("b h q k")
        batch, heads = (evaluator.size(extent) for extent in call.query.meta["val"].shape[:2])
        self.queries = evaluator.size(call.query.meta["val"].shape[2])
        self.keys = evaluator.size(call.key.meta["val"].shape[2])
        sizes = (batch, heads, self.queries, self.keys)
        # The call's own sizes: an empty one would make every claim true.
        self.inside = [z3.And(i >= 0, i < n) for i, n in zip((self.b, self.h, self.q, self.k), sizes, strict=True)]
        self.attends = self.element(self.q, self.k)

    def element(self, query: z3.ArithRef, key: z3.ArithRef) -> Term:
        """The mask at (b, h, query, key), broadcast to the scores [B, H, L, S]."""
        shape = self.mask.meta["val"].shape
        index = (self.b, self.h, query, key)[4 - len(shape) :]
        index = tuple(
            z3.IntVal(0) if isinstance(size, int) and size == 1 else item
            for size, item in zip(shape, index, strict=True)
        )
        return self.evaluator.at(self.mask, index)

    def holds(self, predicate: z3.BoolRef) -> bool:
        return self.evaluator.proves(self.attends == predicate, *self.inside)

    def classify(self, inputs: frozenset[str]) -> MaskProof:
        q, k = self.q, self.k
        for name, predicate in (
            ("full", z3.BoolVal(True)),
            ("causal", k <= q),
            ("causal_lower_right", k <= q + self.keys - self.queries),
        ):
            if self.holds(predicate):
                return MaskProof(name, PROVED, reason="holds for every index and length of the profile")
        reads = self.evaluator.reads(self.attends)
        # An operation without a model hangs on whatever it is computed from.
        depends_on = tuple(sorted(_ancestors([node for node in self.mask.graph.nodes if node.name in reads]) & inputs))
        width = self._window()
        if width is not None:
            return MaskProof(
                "sliding_window", PROVED, depends_on, reason=f"sees the last {width} keys, itself included"
            )
        if depends_on and self._is_padding():
            return MaskProof("padding", PROVED, depends_on, reason=f"causal, and keys hang on {', '.join(depends_on)}")
        unmodelled = sorted(reads - inputs)
        hangs = f"hangs on {', '.join(depends_on)}" if depends_on else "is not causal"
        return MaskProof(
            "arbitrary",
            NOT_PROVED,
            depends_on,
            reason=f"not modelled: {', '.join(unmodelled)}" if unmodelled else hangs,
        )

    def _window(self) -> int | None:
        """The width w of a sliding window: the smallest distance q - k at which a key in the past is blocked."""
        optimizer = z3.Optimize()
        optimizer.set("timeout", 2000)
        optimizer.add(*self.evaluator.premises, *self.inside, self.k <= self.q, z3.Not(self.attends))
        optimizer.minimize(self.q - self.k)
        if optimizer.check() != z3.sat:
            return None
        width = optimizer.model().eval(self.q - self.k, model_completion=True).as_long()
        return width if width > 0 and self.holds(z3.And(self.k <= self.q, self.q - self.k < width)) else None

    def _is_padding(self) -> bool:
        """Causal, and what is left over does not change with the query: the last query shows it for every key."""
        last = self.element(self.queries - 1, self.k)
        return self.evaluator.proves(self.queries == self.keys, *self.inside) and self.holds(
            z3.And(self.k <= self.q, last)
        )
