"""GPTQ: weights are rounded to int4 one input channel after the other, and what is lost by one, the next make up for.

Frantar, Ashkboos, Hoefler and Alistarh, ICLR 2023, algorithm 1: what a layer's outputs lose on the rows of a text is a
quadratic form of what its weights lose, H = sum of x x^T; once a column is rounded, the columns that are left are moved
to the least of that form.  As there, columns go in the order of the rows' size in them (``--act-order`` of the authors'
code), H is damped, and columns far ahead are moved by many at once.  Scales are chosen before, each of its block the
one at which what is lost, weighed by the size of the rows, is least.

The text runs through the model once: each layer is rounded when its rows arrive, so they come of layers that have been
rounded, and what these lost is seen by those behind them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from passes.quantised import QuantisedWeight, numbers_of, rounded, widest_scales
from pipeline.model.calibration import not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DAMPING = 0.01
"""Of the mean diagonal of H, added to it; source: section 3.3, step 3 there."""
AT_ONCE = 128
"""Columns whose effect on those behind them is added up first; source: section 3.3, step 2 there."""
NARROWER = torch.linspace(0.6, 1.0, 17)
"""Of the scale that cuts nothing off: which are tried."""


def optimised(
    model: PreTrainedModel, layers: dict[str, nn.Linear], block: int, dtype: torch.dtype, tokens: Tensor
) -> dict[str, QuantisedWeight]:
    """Layer -> its weight in int4, in blocks of ``block`` with scales of ``dtype``, by ``tokens`` [samples, length].
    A layer that no row reaches, such as an expert that is never chosen, is left out.

    ``model``, whose weights are finite, stays as it is.  Raises :class:`RunError` where rows are not finite.
    """
    searched = copy.deepcopy(model).float()  # on a CPU products of 16 bits take many times those of 32
    found: dict[str, QuantisedWeight] = {}
    rows = _Rows()

    def arrived(name: str, layer: Any, given: Tensor) -> None:
        if name not in found:
            found[name] = in_int4(layer.weight, rows.form(name, given), block, dtype)
            layer.weight = nn.Parameter(found[name].dequantised(dtype).float(), requires_grad=False)

    for name in layers:
        searched.get_submodule(name).register_forward_pre_hook(
            lambda layer, given, name=name: arrived(name, layer, given[0])
        )
    if (head := searched.get_output_embeddings()) is not None:  # of all rows they fill a GPU
        head.register_forward_pre_hook(lambda _, given: (given[0][:, -1:], *given[1:]))
    with torch.no_grad():
        searched(input_ids=tokens, use_cache=False)
    return found


class _Rows:
    """The form H of the rows of a layer, of which several in a row (query, key and value) have the same."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None

    def form(self, name: str, rows: Tensor) -> Tensor:
        """float64 [in, in], damped, of ``rows`` [..., in]."""
        if self._rows is not rows:
            flat = rows.reshape(-1, rows.shape[-1])
            if not bool(flat.isfinite().all()):
                raise not_finite(name)
            form = (flat.T @ flat).double() / len(flat)
            damping = DAMPING * float(form.diagonal().mean())
            form.diagonal().add_(damping or 1.0)  # rows of zeros say nothing: each column by itself
            self._rows, self._form = rows, form
        return self._form


def in_int4(weight: Tensor, form: Tensor, block: int, dtype: torch.dtype) -> QuantisedWeight:
    """``weight`` [out, in] for rows of ``form`` float64 [in, in], positive definite."""
    size = form.diagonal().float()
    scales = best_scales(weight.float(), size, block, dtype)
    order = size.argsort(descending=True, stable=True)
    # Row i of the factor is the inverse of H without the columns before i, as far as column i needs it.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(form[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left, scale_of = weight.float()[:, order], scales.repeat_interleave(block, 1)[:, order]
    values = torch.empty_like(left, dtype=torch.int8)
    for start in range(0, left.shape[1], AT_ONCE):
        end = min(start + AT_ONCE, left.shape[1])
        lost = torch.empty_like(left[:, start:end])
        for i in range(start, end):
            values[:, i] = rounded(left[:, i] / scale_of[:, i], "int4")
            lost[:, i - start] = (left[:, i] - values[:, i] * scale_of[:, i]) / factor[i, i]
            left[:, i + 1 : end] -= lost[:, i - start, None] * factor[i, i + 1 : end]
        left[:, end:] -= lost @ factor[start:end, end:]
    return QuantisedWeight("int4", values[:, order.argsort()], scales)


def best_scales(weight: Tensor, size: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """float32 [out, blocks]: of :data:`NARROWER` those at which ``weight`` float32 [out, in], rounded to nearest, loses
    the least squares, each times the mean square ``size`` [in] of what it is multiplied with."""
    blocks, sizes = weight.unflatten(1, (-1, block)), size.unflatten(0, (-1, block))
    widest = widest_scales(blocks, "int4")
    best, least = torch.empty_like(widest), torch.full_like(widest, torch.inf)
    for part in NARROWER.tolist():
        scales = numbers_of(dtype, widest * part)
        lost = ((rounded(blocks / scales[..., None], "int4") * scales[..., None] - blocks).square() * sizes).sum(-1)
        best, least = torch.where(lost < least, scales, best), torch.minimum(lost, least)
    return best
