"""Which calls may have a row that sees no key: it gives 0 in PyTorch, and anything in TensorRT's layers."""

from __future__ import annotations

from torch.fx.experimental.symbolic_shapes import statically_known_true

from passes.proof.calls import AttentionCall
from passes.proof.mask import Absent, Causal, Chunked, Full, LowerRight, Packed, Window
from passes.proof.masks import Proof, Status


def every_row_sees_a_key(call: AttentionCall, proof: Proof) -> bool:
    """Whether no row of the call is blocked from every key, by the class of its mask."""
    queries, keys = (tensor.meta["val"].shape[-2] for tensor in (call.query, call.key))
    if proof.status is not Status.PROVED:
        return False
    match proof.mask:
        case Absent() | Full() | Causal():  # the first key
            return bool(statically_known_true(keys >= 1))
        case LowerRight() | Window() | Chunked() | Packed():  # itself
            return bool(statically_known_true(keys >= queries))
    return False
