"""Runs the passes over a program: numbers, times, logs and checks them, and leaves out what is asked to be."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

from torch.export import ExportedProgram

from passes.errors import UserError
from passes.graph import ops
from passes.graph.lowerings.lowering import OURS, BackEnd
from passes.graph.passes import OPTIONAL, PASSES, Work
from passes.graph.records import PassRecord
from passes.graph.rewritten import Rewritten, assumed_of, record
from passes.graph.strategies import strategy

DECOMPOSITIONS = {ops.DECOMPOSED: ops.written_out, ops.BLANKED: ops.without_unseeing}
_log = logging.getLogger(__name__)


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
    ``without`` the passes that are left out, of :data:`passes.graph.passes.OPTIONAL`.

    ``program`` is changed in place; use what is returned.  Raises :class:`passes.errors.UserError` for other names, and
    :class:`passes.errors.RunError` of kind ``unproven`` where the strategy was told to, and of kind ``no_attention``
    for a graph without attention ops.
    """
    for unknown in set(without) - set(OPTIONAL):
        raise UserError(f"without={unknown}: allowed: {', '.join(OPTIONAL)}")
    work = Work(program, strategy(name), unproven, assume, back_end)
    done: list[PassRecord] = []
    for number, each in enumerate(PASSES, 1):
        if each.name in without:
            continue
        started = time.perf_counter()
        changed = each.run(work)
        work.program.graph_module.graph.lint()
        done.append(PassRecord(each.name, changed, round(time.perf_counter() - started, 4)))
        _log.debug("%d of %d, %s: %d changed, %.4f s", number, len(PASSES), each.name, changed, done[-1].seconds)
    work.program.graph_module.recompile()
    calls = [record(each.call, each.proof, each.decision, each.native_gqa, each.scale) for each in work.attention]
    assumed = assumed_of([(each.proof, each.decision) for each in work.attention])
    return Rewritten(work.program, calls, done, assumed)
