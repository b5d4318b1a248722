"""Puts weights of fewer bits into a transformers model, for eager PyTorch and for a trace of it.

In eager PyTorch a layer has the weight that the small one stands for, in the type of the model, so it runs as ever:
that is what an engine of the small weights is judged by.  While the model is traced (:func:`small`) the same layer
computes its weight from the small one, so that the graph holds that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from passes.quantised import QuantisedWeight, dequantised, rows_in_e4m3

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VALUES, SCALES, FACTORS = "few_bits_values", "few_bits_scales", "few_bits_factors"
HOOK = "few_bits_hook"


def put(model: PreTrainedModel, weights: Mapping[str, QuantisedWeight]) -> None:
    """Have the layers of ``model`` that ``weights`` names, linear ones and embeddings, multiply and look up these, in
    the place of what was put into them before.

    One that two names share stays shared."""
    made: dict[int, nn.Parameter] = {}
    for name, each in weights.items():
        layer: Any = model.get_submodule(name)
        dtype, device = layer.weight.dtype, layer.weight.device
        if id(each) not in made:
            made[id(each)] = nn.Parameter(each.to(device).dequantised(dtype), requires_grad=False)
        layer.weight = made[id(each)]
        if (hook := vars(layer).pop(HOOK, None)) is not None:
            hook.remove()
        layer._buffers.pop(FACTORS, None)
        if each.row_factors is not None:
            layer.register_buffer(FACTORS, each.row_factors.to(device))
        if each.row_factors is not None or each.row_scale is not None:
            vars(layer)[HOOK] = layer.register_forward_pre_hook(partial(_rows, scale=each.row_scale))


def _rows(layer: nn.Module, given: tuple[Tensor, ...], scale: float | None) -> tuple[Tensor, ...]:
    rows, *others = given
    factors: Tensor | None = layer._buffers.get(FACTORS)
    if factors is not None:
        rows = rows * factors.to(rows.dtype)
    return (rows if scale is None else rows_in_e4m3(rows, scale), *others)


@contextmanager
def small(model: PreTrainedModel, weights: Mapping[str, QuantisedWeight]) -> Iterator[None]:
    """While the block traces ``model``, in which ``weights`` were :func:`put`, its layers compute theirs from them."""
    before = []
    for name, each in weights.items():
        layer: Any = model.get_submodule(name)
        weight, kind = layer.weight, type(layer)
        before.append((layer, weight, kind))
        del layer.weight
        here = each.to(weight.device)
        layer.register_buffer(VALUES, here.values)
        layer.register_buffer(SCALES, here.scales)
        # A property is found before what torch looks up among a module's parameters.
        of = property(partial(_weight, kind=each.kind, dtype=weight.dtype))
        layer.__class__ = type(kind.__name__, (kind,), {"weight": of})
    try:
        yield
    finally:
        for layer, weight, kind in before:
            layer.__class__ = kind
            del layer._buffers[VALUES], layer._buffers[SCALES]
            layer.weight = weight


def _weight(layer: Any, kind: str, dtype: Any) -> Tensor:
    return dequantised(getattr(layer, VALUES), getattr(layer, SCALES), kind, dtype)
