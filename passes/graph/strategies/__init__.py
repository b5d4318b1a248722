"""What is done about the mask of each attention call.

A strategy is one module with one function, ``decide(call, proof, unproven, back_end) -> Decision``; adding one is
adding a module here and a YAML file.  :mod:`passes.graph.driver` carries the decisions out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from passes.errors import RunError
from passes.graph.lowerings import written_out
from passes.graph.lowerings.cached import over_cache
from passes.graph.lowerings.lowering import BackEnd, Lowering
from passes.proof.calls import AttentionCall
from passes.proof.masks import Proof


@dataclass(frozen=True)
class Decision:
    lowering: Lowering
    reason: str
    unproved: bool = False
    """The mask is dropped although nothing proves that it may be."""


Strategy = Callable[[AttentionCall, Proof, "str | None", BackEnd], Decision]


def strategy(name: str) -> Strategy:
    """The strategy of that name: the ``decide`` of the module ``passes.graph.strategies.NAME``."""
    decide: Strategy = importlib.import_module(f"{__name__}.{name}").decide
    return decide


def unproved(call: AttentionCall, proof: Proof, unproven: str | None, otherwise: Decision) -> Decision:
    """What is done about a call whose mask may not go: ``otherwise``, but for one over a cache.

    That one is written out: the native layer with a mask takes 44 us of one query over 2048 keys, products 52 (H100,
    TensorRT-RTX 1.6, docs/generation.md), but the cache holds values with the keys' axis last, which only products read
    as they lie.  What windows and causal masks become of one query is faster than either, see
    :mod:`passes.graph.lowerings.cached`.
    Raises :class:`passes.errors.RunError` of kind ``unproven`` where ``unproven`` is ``error``.
    """
    if unproven == "error":
        raise RunError(
            "unproven", f"{call.name}: the mask is not proved causal ({why(proof)}); strategy.unproven=error"
        )
    return Decision(written_out.DECOMPOSED, why(proof)) if over_cache(call) else otherwise


def why(proof: Proof) -> str:
    """The proof in one clause, for a decision's reason."""
    return f"{proof.mask} {proof.status}" + (f": {proof.reason}" if proof.reason else "")
