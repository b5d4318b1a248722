"""From a program to one whose masks are proved and whose attention calls are rewritten."""

from __future__ import annotations

from collections.abc import Collection

from torch.export import ExportedProgram

from passes.graph import driver, ops
from passes.graph.lowerings.lowering import OURS, BackEnd
from passes.graph.passes import PASSES, Work
from passes.graph.rewritten import Rewritten, record
from passes.graph.strategies import strategy

DECOMPOSITIONS = {ops.DECOMPOSED: ops.written_out, ops.BLANKED: ops.without_unseeing}


def rewrite(
    program: ExportedProgram,
    name: str,
    unproven: str | None = None,
    assume: Collection[str] = (),
    back_end: BackEnd = OURS,
    without: Collection[str] = (),
) -> Rewritten:
    """Prove every mask of ``program`` and rewrite its attention calls by strategy ``name``, for ``back_end``.

    ``assume`` names the :data:`passes.proof.conditions.CONDITIONS` that hold for every input, says the user;
    ``without`` those of :data:`passes.graph.passes.PASSES` that are left out, where they are optional.

    ``program`` is changed in place; use what is returned.  Raises :class:`passes.errors.RunError` of kind ``unproven``
    where the strategy was told to, and of kind ``no_attention`` for a graph without attention ops.
    """
    work = Work(program, strategy(name), unproven, assume, back_end)
    done = driver.run(PASSES, work, lambda each: each.program.graph_module, without)
    assumed = {condition for each in work.attention if each.is_assumed for condition in each.proof.conditions}
    return Rewritten(work.program, [record(each, back_end) for each in work.attention], done, sorted(assumed))
