"""Our converters and lowering passes in the installed Torch-TensorRT, for good or while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.private import of_torch_tensorrt
from passes.private.of_torch import schema_of
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
Implementation = Callable[[Any, Node, tuple[Any, ...], dict[str, Any]], Any]
"""(conversion context, node, its args and kwargs with tensors of the network in the place of nodes) -> the tensors that
it gives."""


@dataclass(frozen=True, eq=False)
class Converter:
    """How calls of ``targets`` become layers, at static and dynamic shapes alike."""

    targets: tuple[Any, ...]
    implementation: Implementation
    takes: Callable[[Node], bool] = lambda node: True
    """Of which calls; any other is left to the next converter in the registry."""

    def __call__(self, ctx: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
        """As Torch-TensorRT calls it."""
        return self.implementation(ctx, ctx.current_node, args, kwargs)

    def add(self) -> None:
        """Put it before what is registered, unless it is there already."""
        load_stack()
        if self.is_there:
            return
        from torch_tensorrt.dynamo.conversion import ConverterPriority, dynamo_tensorrt_converter

        for target in self.targets:
            dynamo_tensorrt_converter(
                target,
                capability_validator=lambda node, settings: self.takes(node),
                priority=ConverterPriority.HIGH,
                supports_dynamic_shapes=True,
            )(self)

    def remove(self) -> None:
        """Take it out again, if it is there."""
        load_stack()
        registered = of_torch_tensorrt.converters()
        for target in self.targets:
            others = [each for each in registered.pop(target, ()) if each.converter_implementation is not self]
            if others:
                registered[target] = others

    @property
    def is_there(self) -> bool:
        registered = of_torch_tensorrt.converters().get(self.targets[0], ())
        return any(each.converter_implementation is self for each in registered)


@contextmanager
def registered(*converters: Converter) -> Iterator[None]:
    """Those of ``converters`` that are not there already are there while the block runs, the last one first."""
    load_stack()
    added = [converter for converter in converters if not converter.is_there]
    try:
        for converter in added:
            converter.add()
        yield
    finally:
        for converter in added:
            converter.remove()


def takes(node: Node) -> bool:
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


def _layer(ctx: Any, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    output, _ = convert(load_stack(), ctx, node, args, kwargs)
    return output if node.target is SDPA else (output, *[None] * (len(schema_of(node.target).returns) - 1))


NATIVE_ATTENTION = Converter(tuple(DROPOUT_AT), _layer, takes)
"""Every form of attention, wherever the native layer is right for it."""


def add_lowering_pass(lowering_pass: LoweringPass) -> None:
    """Have Torch-TensorRT run ``lowering_pass``, once, before its own, which turn a static mask into a constant."""
    load_stack()
    passes = of_torch_tensorrt.lowering_passes()
    if lowering_pass not in passes:
        passes.insert(0, lowering_pass)


def remove_lowering_pass(lowering_pass: LoweringPass) -> None:
    """Take it out again, if it is there."""
    passes = of_torch_tensorrt.lowering_passes()
    if lowering_pass in passes:
        passes.remove(lowering_pass)
