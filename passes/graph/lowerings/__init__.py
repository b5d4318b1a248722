"""What may become of an attention call whose mask is proved: the first row of :data:`TABLE` that takes it.

A mask form with a fast lowering of its own is one module beside these and one row here; every strategy shares it.
"""

from __future__ import annotations

from passes.graph.lowerings import aten, cached, local, native, written_out
from passes.graph.lowerings.lowering import Ability, BackEnd, Lowering
from passes.proof.calls import AttentionCall
from passes.proof.masks import Proof, Status

TABLE: tuple[Lowering, ...] = (
    native.CAUSAL, native.FULL, native.LOWER_RIGHT, aten.CAUSAL, aten.FULL, cached.CACHED, local.WINDOWED,
    local.CHUNKED,
)  # fmt: skip
"""Without the mask.  Where both can be had, the native layer comes before aten's words for it."""


def without_mask(call: AttentionCall, proof: Proof, back_end: BackEnd) -> Lowering | None:
    """How ``call`` may be written for ``back_end`` without its mask; None where nothing that is proved, or was asserted
    by the user, allows it."""
    if proof.status is Status.NOT_PROVED:
        return None
    return next((each for each in TABLE if each.takes(call, proof, back_end)), None)


def with_mask(back_end: BackEnd) -> Lowering:
    """How a call may be written for ``back_end`` whatever its mask is."""
    return native.MASKED if Ability.NATIVE in back_end else written_out.UNTOUCHED
