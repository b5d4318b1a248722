"""From a program to one whose masks are proved and whose attention calls are rewritten."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.export import ExportedProgram

from passes import quantised
from passes.graph import cache_ops, driver, local_attention, ops
from passes.graph.lowerings.lowering import OURS, BackEnd
from passes.graph.passes import PASSES, Work
from passes.graph.rewritten import Rewritten, record
from passes.graph.strategies import strategy

DECOMPOSITIONS = {ops.DECOMPOSED: ops.written_out, ops.BLANKED: ops.without_unseeing}
"""Markers, that lowering writes out."""
IN_ATEN = {
    **DECOMPOSITIONS,
    ops.NATIVE: ops.native_in_aten,
    cache_ops.UPDATE: cache_ops.update_in_aten,
    cache_ops.READ: cache_ops.read_in_aten,
    cache_ops.CACHED: cache_ops.cached_in_aten,
    local_attention.WINDOWED: local_attention.windowed_in_aten,
    local_attention.CHUNKED: local_attention.chunked_in_aten,
    quantised.DEQUANTISED: quantised.in_aten,
    quantised.ROWS_IN_E4M3: quantised.rows_in_aten,
}
"""Every operation of ours, in torch's own words."""


def rewrite(
    program: ExportedProgram,
    name: str,
    unproven: str | None = None,
    assume: Collection[str] = (),
    back_end: BackEnd = OURS,
    without: Collection[str] = (),
    needed: bool = True,
) -> Rewritten:
    """Prove every mask of ``program`` and rewrite its attention calls by strategy ``name``, for ``back_end``.

    ``assume`` names the :data:`passes.proof.conditions.CONDITIONS` that hold for every input, says the user;
    ``without`` those of :data:`passes.graph.passes.PASSES` that are left out, where they are optional.

    ``program`` is changed in place; use what is returned.  Raises :class:`passes.errors.RunError` of kind ``unproven``
    where the strategy was told to, and of kind ``no_attention`` for a graph without attention ops where they are
    ``needed``.
    """
    work = Work(program, strategy(name), unproven, assume, back_end, needed)
    done = driver.run(PASSES, work, lambda each: each.program.graph_module, without)
    assumed = {condition for each in work.attention if each.is_assumed for condition in each.proof.conditions}
    calls = [record(each) for each in work.attention]
    return Rewritten(work.program, calls, done, sorted(assumed), work.written_out)


def in_aten(program: ExportedProgram) -> ExportedProgram:
    """A rewritten ``program`` as one that needs torch alone: it computes the same and has no operation of ours.  The
    weights are shared."""
    return without_evidence(program.run_decompositions(dict(IN_ATEN)))


def without_evidence(program: ExportedProgram) -> ExportedProgram:
    """``program`` without the masks that stand beside calls whose claim says the same, in place: where lengths are
    known such a mask is a constant of the length squared, 1 GiB at 32768 tokens."""
    graph = program.graph
    for node in graph.find_nodes(op="call_function", target=ops.NATIVE):
        if node.args[4] != "none":
            node.args = (*node.args[:3], None, *node.args[4:])
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)  # of what the graph itself makes; one would hold its mask's graph back
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program
