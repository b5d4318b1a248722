"""What each operation does to one element: the models that :class:`passes.proof.symbolic.Evaluator` evaluates with.

A model gives the element of its node at an index, as a term over elements of the operands.  It raises
:class:`passes.proof.terms.Unmodelled` where it does not know exactly; that costs proofs and never makes a wrong one.
"""

from __future__ import annotations

from typing import Any

from passes.proof.operations import making, moves, pointwise, reductions
from passes.proof.operations.moves import MOVES
from passes.proof.operations.registry import Model

MODELS: dict[Any, Model] = {**pointwise.MODELS, **making.MODELS, **moves.MODELS, **reductions.MODELS}

__all__ = ["MODELS", "MOVES"]
