"""``scaled_dot_product_attention`` in aten's own words, without the mask.

Legal because torch's ``is_causal`` is ``k <= q`` (upper-left), which is what the mask was proved to be for every index,
length and input; a mask that blocks nothing is none.  Any back end can take the result.
"""

from __future__ import annotations

from torch.fx import Graph

from passes.graph.lowerings.lowering import Ability, Action, Lowering
from passes.graph.writing import SDPA, put
from passes.proof.calls import AttentionCall
from passes.proof.mask import Absent, Causal, Full


def _causal(graph: Graph, call: AttentionCall) -> None:
    put(graph, call, SDPA, (None, 0.0, True), scale=call.scale)


def _full(graph: Graph, call: AttentionCall) -> None:
    put(graph, call, SDPA, (None, 0.0, False), scale=call.scale)


CAUSAL = Lowering(Action.REWRITTEN_CAUSAL, _causal, (Causal,), Ability.ATEN)
FULL = Lowering(Action.REWRITTEN_FULL, _full, (Absent, Full), Ability.ATEN)
