"""Which layers of a KV cache need not keep every token: those whose window was proved to see none that are older.

The decode step is traced over a cache that keeps everything, and the mask of each layer proved there
(:mod:`passes.proof.masks`): where it is the window of the last ``width`` tokens, whatever the token's place, what is
older is read by nothing, now or later.  A ring of so many places then does, and a prompt that is longer leaves its last
tokens there.  A layer whose mask is anything else keeps every token.  All rings are of the widest window: transformers
asks one layer how many keys the masks of all of them have.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from transformers import DynamicCache, PreTrainedModel

from passes.graph.cache_ops import UPDATE
from passes.proof.calls import find_calls
from passes.proof.mask import OffsetWindow
from passes.proof.masks import Proof, Status, prover_of
from passes.proof.op_kinds import VIEW_LIKE
from pipeline.config.lengths import in_granules
from pipeline.trace.cache_shape import CacheShape
from pipeline.trace.call_form import Traced

LAYOUTS = (*VIEW_LIKE, torch.ops.aten.transpose.int, torch.ops.aten.permute.default)
"""The same tokens, laid out in another way."""


def with_rings(
    model: PreTrainedModel, cache: CacheShape, step: Callable[[], Traced]
) -> tuple[CacheShape, Traced | None]:
    """``cache`` with a ring in every layer for which one was proved to do, if it is smaller; and the decode step over
    it, where it has been traced.  ``step`` traces that over ``cache`` as it is; raises what it raises.

    Whether it is worth a trace is asked of transformers' own cache: of a model without a window nothing is traced.
    """
    widths = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
    if not any(width is not None and in_granules(width) < cache.capacity for width in widths):
        return cache, None
    traced = step()
    found = windows_of(traced.program, cache)
    places = in_granules(max((width for width in found if width is not None), default=cache.capacity))
    if places >= cache.capacity:
        return cache, traced
    return cache.with_rings(places, [width is not None for width in found]), None


def windows_of(program: ExportedProgram, cache: CacheShape) -> list[int | None]:
    """Of each layer of ``cache``, which keeps every token, how many of the latest all its attention is proved to see in
    ``program``, the decode step; None where that is not so, or where anything else reads it."""
    prover = prover_of(program)
    widths = {
        call.node: _width(prover.prove(call), cache.batch) for call in find_calls(program.graph_module, needed=False)
    }
    found: list[int | None] = []
    for i in range(len(cache.layers)):
        readers = {node for kind in ("keys", "values") for node in _readers(program.graph, f"{kind}_{i}")}
        seen = [widths.get(node) for node in readers]
        found.append(max(width for width in seen if width) if seen and all(seen) else None)
    return found


def _width(proof: Proof, batch: int) -> int | None:
    mask, row = proof.mask, "b" if batch > 1 else 0
    if proof.status is not Status.PROVED or not isinstance(mask, OffsetWindow):
        return None
    return mask.width if (mask.source, mask.element) == ("position", (row,)) else None


def _readers(graph: Graph, name: str) -> set[Node]:
    """What reads the tokens of the cache that is the input ``name``, once the new ones are in it."""
    (cache,) = (node for node in graph.find_nodes(op="placeholder") if node.name == name)
    pending, found = list(cache.users), set()
    while pending:
        node = pending.pop()
        if node.target in (UPDATE, *LAYOUTS):
            pending.extend(node.users)
        elif node.op != "output":
            found.add(node)
    return found
