"""Our attention in the installed Torch-TensorRT: its converters and its lowering passes, ours among them.

To register a converter is public (``torch_tensorrt.dynamo.conversion.dynamo_tensorrt_converter``); to take one out
again is not, and neither is the list of lowering passes.  Both are touched here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.tensorrt.attention import asked, convert
from passes.tensorrt.versions import load_stack

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
EFFICIENT = aten._scaled_dot_product_efficient_attention.default
CUDNN = aten._scaled_dot_product_cudnn_attention.default
FLASH = aten._scaled_dot_product_flash_attention.default
DROPOUT_AT = {SDPA: 4, EFFICIENT: 5, CUDNN: 5, FLASH: 3}
"""Place of the dropout's probability among the arguments; source: torch's native_functions.yaml."""

LoweringPass = Callable[[GraphModule, Any], GraphModule]


def takes(node: Node, settings: Any = None) -> bool:
    """Whether our converter is right for the attention call ``node``; what it does not take is left to the others.

    Query [B, Hq, L, D], key [B, Hkv, S, D] and value [B, Hkv, S, Dv] of one floating type, with known head counts,
    Hq % Hkv == 0, and head sizes; a mask of rank 2 to 4, or causal, or neither; no dropout; and of a kernel's call
    nothing but the result is used.
    """
    tensors = [source.meta.get("val") if isinstance(source, Node) else None for source in node.args[:3]]
    query, key, value = (each if isinstance(each, torch.Tensor) and each.dim() == 4 else None for each in tensors)
    if query is None or key is None or value is None:
        return False
    known = [each.shape[axis] for each in (query, key, value) for axis in (1, 3)]
    if not all(isinstance(size, int) for size in known):
        return False
    mask, causal, _ = asked(node, node.args, node.kwargs)
    at = DROPOUT_AT[node.target]  # type: ignore[index]
    dropout = node.args[at] if len(node.args) > at else node.kwargs.get("dropout_p", 0.0)
    return bool(
        query.dtype.is_floating_point
        and query.dtype == key.dtype == value.dtype
        and key.shape[1] == value.shape[1]
        and query.shape[1] % key.shape[1] == 0
        and query.shape[3] == key.shape[3]
        and str(query.shape[0]) == str(key.shape[0]) == str(value.shape[0])
        and (mask is None or (causal == "none" and _rank(mask) in (2, 3, 4)))
        and not dropout
        and (node.target is SDPA or all(user.args[1] == 0 for user in node.users))
    )


def _rank(mask: Any) -> int | None:
    value = mask.meta.get("val") if isinstance(mask, Node) else mask
    return value.dim() if isinstance(value, torch.Tensor) else None


def _converted(ctx: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    output, _ = convert(load_stack(), ctx, ctx.current_node, args, kwargs)
    return output if target is SDPA else (output, *[None] * (len(target._schema.returns) - 1))


def add_converters() -> bool:
    """Put our converter before the installed ones for every form of attention; False where it is there already."""
    load_stack()
    from torch_tensorrt.dynamo.conversion import ConverterPriority, dynamo_tensorrt_converter
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_ATEN_CONVERTERS

    if any(each.converter_implementation is _converted for each in DYNAMO_ATEN_CONVERTERS.get(SDPA, [])):
        return False
    for target in DROPOUT_AT:
        dynamo_tensorrt_converter(
            target, capability_validator=takes, priority=ConverterPriority.HIGH, supports_dynamic_shapes=True
        )(_converted)
    return True


def remove_converters() -> None:
    """Take our converter out again, if it is there."""
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_ATEN_CONVERTERS

    for target in DROPOUT_AT:
        others = [each for each in DYNAMO_ATEN_CONVERTERS[target] if each.converter_implementation is not _converted]
        DYNAMO_ATEN_CONVERTERS[target] = others


@contextmanager
def converters() -> Iterator[None]:
    """Our converter is there while the block runs, and afterwards where it was before."""
    added = add_converters()
    try:
        yield
    finally:
        if added:
            remove_converters()


def add_lowering_pass(lowering_pass: LoweringPass) -> None:
    """Have Torch-TensorRT run ``lowering_pass``, once, before its own, which turn a static mask into a constant."""
    load_stack()
    from torch_tensorrt.dynamo.lowering.passes._aten_lowering_pass import ATEN_POST_LOWERING_PASSES

    if lowering_pass not in ATEN_POST_LOWERING_PASSES.passes:
        ATEN_POST_LOWERING_PASSES.add_pass_with_index(lowering_pass, 0)


def remove_lowering_pass(lowering_pass: LoweringPass) -> None:
    """Take it out again, if it is there."""
    from torch_tensorrt.dynamo.lowering.passes._aten_lowering_pass import ATEN_POST_LOWERING_PASSES

    if lowering_pass in ATEN_POST_LOWERING_PASSES.passes:
        ATEN_POST_LOWERING_PASSES.passes.remove(lowering_pass)
