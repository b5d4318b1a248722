"""What scripts of one's own use: what the masks of an exported program are, and what may be done about them."""

from __future__ import annotations

import copy
from collections.abc import Collection

from torch.export import ExportedProgram

from passes.graph.prepare import prepare
from passes.proof.calls import AttentionCall, find_calls
from passes.proof.masks import MaskProof, prover_of


class Classification(list[tuple[AttentionCall, MaskProof]]):
    """Every attention call of a graph with its proof; prints as a list of what was found."""

    def __str__(self) -> str:
        found: dict[str, list[str]] = {}
        for call, proof in self:
            found.setdefault(str(proof), []).append(call.name)
        return "\n".join(f"{_listed(names)}: {text}" for text, names in found.items())


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def classify(program: ExportedProgram, assume: Collection[str] = ()) -> Classification:
    """What the mask of each attention call of ``program`` is; ``assume`` names
    :data:`passes.proof.conditions.CONDITIONS` to rely on.

    Takes what ``torch.export.export`` gives, and leaves it as it is.  Raises :class:`passes.errors.RunError` of kind
    ``no_attention`` for a graph without attention ops.
    """
    program = prepare(copy.deepcopy(program))
    prover = prover_of(program, assume)
    return Classification((call, prover.prove(call)) for call in find_calls(program.graph_module))
