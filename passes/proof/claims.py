"""The claims about one mask, at one symbolic position; each is put to the solver."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import z3
from torch.fx import Node

from passes.proof.calls import AttentionCall
from passes.proof.mask import (
    Arbitrary,
    Bias,
    Causal,
    Chunked,
    Element,
    Full,
    LowerRight,
    Mask,
    Offset,
    OffsetWindow,
    Packed,
    Padding,
    Ring,
    Window,
)  # fmt: skip
from passes.proof.symbolic import SOLVER_STEPS, Evaluator
from passes.proof.terms import INFINITY, Term, Unmodelled, dtype_of, literal

EVERYWHERE = "holds for every index and length of the profile"


class Found(NamedTuple):
    """The class of a mask, and why in a clause."""

    mask: Mask
    reason: str


def _name(application: Term) -> str:
    return str(application.decl().name()).removesuffix("[]")


def _element(application: Term, batch: Term) -> Element | None:
    """Which element of an input ``application`` is, where that is one, or one for each row."""
    places = [z3.simplify(place) for place in application.children()]
    if not all(z3.is_int_value(place) or place.eq(batch) for place in places):
        return None
    return tuple("b" if place.eq(batch) else place.as_long() for place in places)


def ancestors(nodes: list[Node], through_sizes: bool = False) -> set[str]:
    """Names of ``nodes`` and of everything whose contents they are computed from; a size is no content, unless
    ``through_sizes``."""
    pending, seen = list(nodes), set()
    while pending:
        node = pending.pop()
        if node not in seen and (through_sizes or node.target is not torch.ops.aten.sym_size.int):
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return {node.name for node in seen}


class Claims:
    """What can be claimed about the mask of ``call``, which is broadcast to the scores [B, H, L, S].

    b and h run over the mask's own batches and heads, which need not be the query's: a claim about all of them is one
    about the scores.  Raises :class:`passes.proof.terms.Unmodelled` where the sizes cannot be told, and where the mask
    has more batches or heads than query and key: without it the result would have fewer.
    """

    def __init__(self, evaluator: Evaluator, call: AttentionCall) -> None:
        assert call.mask is not None
        self.evaluator, self.mask = evaluator, call.mask
        self.b, self.h, self.q, self.k = z3.Ints("b h q k")
        query, key = (node.meta["val"].shape for node in (call.query, call.key))
        shape = self.mask.meta["val"].shape
        self.broadcast = (*((1,) * (4 - len(shape)) + tuple(shape))[:2], query[2], key[2])
        """Sizes of what is claimed about: the mask, broadcast to queries and keys."""
        sizes = [evaluator.size(extent) for extent in self.broadcast]
        for dim, name in enumerate(("batches", "heads")):
            tensors = [evaluator.size(tensor[dim]) for tensor in (query, key)]
            if not evaluator.proves(z3.Or(sizes[dim] == 1, *(sizes[dim] == size for size in tensors))):
                raise Unmodelled(f"the mask has {name} of its own")
        self.queries, self.keys = sizes[2:]
        # An empty mask would make every claim true.
        self.inside = [z3.And(i >= 0, i < n) for i, n in zip((self.b, self.h, self.q, self.k), sizes, strict=True)]
        self.place = self.q + self.keys - self.queries
        element = self.element(self.q, self.k)
        self.attends, self.blocked = element, z3.Not(element) if z3.is_bool(element) else element
        self.is_float = not z3.is_bool(element)
        if self.is_float:
            least = literal(torch.finfo(self.mask.meta["val"].dtype).min, self.mask.meta["val"].dtype)
            self.attends, self.blocked = element == 0, element <= least
            self.value = element

    def element(self, query: z3.ArithRef, key: z3.ArithRef) -> Term:
        """The mask at (b, h, query, key), broadcast to the scores [B, H, L, S]."""
        index = (self.b, self.h, query, key)
        return self.evaluator.at(self.mask, self.evaluator.align(self.mask.meta["val"].shape, self.broadcast, index))

    def holds(self, predicate: z3.BoolRef, *lemmas: z3.BoolRef) -> bool:
        claim = self.attends == predicate
        if self.is_float:
            claim = z3.And(claim, z3.Implies(z3.Not(predicate), self.blocked))
        return self.evaluator.proves(claim, *self.inside, *lemmas)

    def search(self) -> tuple[Evaluator, Term, tuple[Any, ...], list[z3.BoolRef]]:
        """What :func:`passes.proof.counterexample.find` needs."""
        return self.evaluator, self.attends, (self.b, self.h, self.q, self.k), self.inside

    def depends_on(self, inputs: frozenset[str]) -> tuple[str, ...]:
        """The ``inputs`` that the mask's truth hangs on; an operation without a model hangs on all it is made of."""
        reads = self.evaluator.reads(self.attends)
        return tuple(sorted(ancestors([node for node in self.mask.graph.nodes if node.name in reads]) & inputs))

    # -- the classes ---------------------------------------------------------------------------------

    def droppable(self) -> Mask | None:
        """:class:`Full`, :class:`Causal` or :class:`LowerRight`: the first that is proved."""
        predicates: dict[Mask, z3.BoolRef] = {
            Full(): z3.BoolVal(True),
            Causal(): self.k <= self.q,
            LowerRight(): self.k <= self.place,
        }
        return next((mask for mask, predicate in predicates.items() if self.holds(predicate)), None)

    def classify(self) -> Found:
        """The narrowest class of :mod:`passes.proof.mask` that is proved, but for those of
        :meth:`of_bounded_inputs`."""
        if (mask := self.droppable()) is not None:
            return Found(mask, f"{EVERYWHERE}{self._least_numbers()}")
        if self.is_float and not self.evaluator.proves(z3.Or(self.attends, self.blocked), *self.inside):
            return Found(Bias(), f"may hold numbers other than 0 and blocked{self._unmodelled()}")
        past = self.k <= self.place
        reads = self.evaluator.reads(self.attends)
        if not reads:
            width = self._first_blocked(self.place - self.k, past)
            if width and self.holds(z3.And(past, self.place - self.k < width)):
                return Found(Window(width), f"sees the last {width} keys, itself included")
            size = self._first_blocked(self.place, past)
            if size and self.holds(z3.And(past, self.k / size == self.place / size)):
                return Found(Chunked(size), f"sees the keys of its own chunk of {size}")
            return Found(Arbitrary(), "is not causal")
        named = ", ".join(sorted(reads))
        if self.holds(z3.And(past, self._attends_last())):
            return Found(Padding(), f"causal, and keys hang on {named}")
        return Found(Arbitrary(), f"hangs on {named}{self._unmodelled()}")

    def of_bounded_inputs(self) -> Found | None:
        """:class:`Offset`, :class:`OffsetWindow`, :class:`Ring` or :class:`Packed`: classes that hold only as long as
        no sum of inputs overflows."""
        for offset in self._applications():
            if self._is_free(offset) and (found := self._placed(offset)) is not None:
                return found
        lemmas = self._segment_lemmas()
        for mine, theirs in self._pairs():
            if self.holds(z3.And(self.k <= self.place, mine == theirs), *lemmas):
                segment = _name(mine)
                return Found(Packed(segment), f"causal among places of equal {segment}")
        return None

    def _placed(self, offset: Term) -> Found | None:
        """What the mask is behind ``offset``, a number from an input."""
        source, element = _name(offset), _element(offset, self.b)
        place = self.q + offset
        past = self.k <= place
        if self.holds(past):
            return Found(Offset(source, element), f"sees keys up to its own place behind {source}")
        width = self._first_blocked(place - self.k, past)
        if width and self.holds(z3.And(past, place - self.k < width)):
            reason = f"sees the last {width} keys up to its own place behind {source}"
            return Found(OffsetWindow(source, element, width), reason)
        if not isinstance(self.broadcast[3], int):
            return None
        age = (place - self.k) % self.broadcast[3]
        width = self._first_blocked(age, age <= place) or self.broadcast[3]
        if self.holds(z3.And(age <= place, age < width)):
            reason = f"sees the last {width} tokens up to its own place behind {source}, kept in a ring"
            return Found(Ring(source, element, width), reason)
        return None

    def _segment_lemmas(self) -> list[z3.BoolRef]:
        """What equal running sums say about other numbers of the same two places.

        Let c be the running sum of a condition s.  If c is equal at i and at j > i, s holds nowhere in (i, j].  Where
        the solver proves that x rises by one wherever s does not hold, x(j) - x(i) = j - i follows by induction.
        This is how positions are related to the segments that are made of them.
        """
        nodes = {node.name: node for node in self.mask.graph.nodes}
        pairs, lemmas = self._pairs(), []
        for c_mine, c_theirs in pairs:
            running = nodes[self.evaluator.inputs[c_mine.decl().name()]]
            if running.target is not torch.ops.aten.cumsum.default or not self._counts_along_rows(running):
                continue
            place = z3.FreshInt("place")
            row = c_mine.children()[:-1]
            starts = self.evaluator.at(running.args[0], (*row, place))
            inside = [place >= 1, place < self.evaluator.shape(running)[-1], *self.inside]
            for x_mine, x_theirs in pairs:
                if x_mine.decl() == c_mine.decl() or not x_mine.children()[-1].eq(c_mine.children()[-1]):
                    continue
                x, x_row = x_mine.decl(), x_mine.children()[:-1]
                rises = x(*x_row, place) - x(*x_row, place - 1) == 1
                if self.evaluator.proves(z3.Implies(z3.Not(starts), rises), *inside):
                    apart = c_mine.children()[-1] - c_theirs.children()[-1]
                    lemmas.append(z3.Implies(c_mine == c_theirs, x_mine - x_theirs == apart))
        return lemmas

    def _counts_along_rows(self, running: Node) -> bool:
        """Whether ``running`` counts conditions along its last dimension, in a type that no count overflows."""
        last = running.meta["val"].dim() - 1
        types = dtype_of(running.args[0]), dtype_of(running)  # type: ignore[arg-type]
        return types == (torch.bool, torch.int64) and self.evaluator.dim(running, running.args[1]) == last  # type: ignore[arg-type]

    def _least_numbers(self) -> str:
        """A warning where blocked entries of a float mask are not -inf."""
        if not self.is_float or self.evaluator.proves(z3.Implies(self.blocked, self.value <= -INFINITY), *self.inside):
            return ""
        return "; blocked entries are the type's least number, which blocks while scores stay far above it"

    def _unmodelled(self) -> str:
        calls = {node.name: node.target for node in self.mask.graph.nodes if node.op == "call_function"}
        missing = sorted({str(calls[name]) for name in self.evaluator.reads(self.attends) if name in calls})
        return f"; no exact model of {', '.join(missing)} here" if missing else ""

    def _first_blocked(self, distance: z3.ArithRef, past: z3.BoolRef) -> int | None:
        """The smallest ``distance`` at which a key in the ``past`` is blocked; None where that is not above 0."""
        optimizer = z3.Optimize()
        optimizer.set("rlimit", SOLVER_STEPS)
        optimizer.set("ctrl_c", False)  # see Evaluator.solver
        optimizer.add(*self.evaluator.premises, *self.inside, past, z3.Not(self.attends))
        optimizer.minimize(distance)
        if optimizer.check() != z3.sat:
            return None
        found = optimizer.model().eval(distance, model_completion=True).as_long()
        return found if found > 0 else None

    def _attends_last(self) -> z3.BoolRef:
        """Whether the last query, which may see every key, attends to k: what is left of a padding mask."""
        last = self.element(self.queries - 1, self.k)
        return last == 0 if self.is_float else last

    def _applications(self) -> list[Term]:
        """The integers that the mask reads from inputs, and from operations without a model."""
        return [term for _, term in self.evaluator.applications(self.attends) if z3.is_int(term)]

    def _is_free(self, term: Term) -> bool:
        """Whether ``term`` is the same for every query and key."""
        moved = z3.substitute(term, (self.q, z3.FreshInt("q")), (self.k, z3.FreshInt("k")))
        return bool(moved.eq(term))

    def _pairs(self) -> list[tuple[Term, Term]]:
        """Applications of one function: to the query's place in a row, and to the key in the same row."""
        found = self._applications()
        elsewhere = (self.k, z3.FreshInt("k"))
        return [
            (mine, theirs)
            for mine in found
            for theirs in found
            if mine.decl() == theirs.decl()
            and not mine.eq(theirs)
            and z3.substitute(mine, elsewhere).eq(mine)
            and all(a.eq(b) for a, b in zip(mine.children()[:-1], theirs.children()[:-1], strict=True))
            and z3.simplify(z3.substitute(mine, (self.q, self.k - self.keys + self.queries))).eq(z3.simplify(theirs))
        ]
