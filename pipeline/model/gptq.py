"""GPTQ: what rounding a column of a weight loses is made up for by the columns that are not rounded yet.

Frantar and others, ICLR 2023.  What an error of a layer's weight costs depends on the rows that it multiplies: with
H the sum of x xT over the rows x of a text, an error e costs e H eT.  Columns are rounded one after the other, that of
the largest rows first, and the Cholesky factor of H's inverse says how the rest changes best.

The scale of a block is a share of that at which nothing of it is cut off: the one of least error, in which each column
counts by what it cannot hand on.

The layers are rounded while the model reads the text, each in the moment in which it is called: so its rows are those
that the layers before it give as they are by then, and layers that read the same rows share one H.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from passes.quantised import QuantisedWeight, numbers_of, rounded
from pipeline.model import few_bits
from pipeline.model.calibration import see_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DAMPING = 0.01
"""Of the mean of H's diagonal, added to all of it: the paper's."""
LAZY = 128
"""Columns whose errors are handed on together: the paper's."""
SHARES = [percent / 100 for percent in range(100, 58, -2)]
"""Of the scale at which nothing is cut off, those that are tried."""


def made_up_for(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Linear],
    before: Mapping[str, QuantisedWeight],
    tokens: Tensor,
    nearest: Callable[[str, Tensor], QuantisedWeight],
    dtype: torch.dtype,
) -> dict[str, QuantisedWeight]:
    """Layer -> its weight in the kind and blocks that ``nearest`` (a layer's name and its weight [out, in]) gives it,
    for those of ``layers`` that are called when ``model`` reads ``tokens``, int64 [samples, length]; of more calls the
    first counts.

    ``before``: what is rounded already.  ``dtype``: whose numbers the scales are, times a power of two.  ``model``
    itself stays as it is.  Raises :class:`RunError` for rows that are not finite, and as ``nearest``.
    """
    read = copy.deepcopy(model).float()  # on a CPU products of 16 bits take many times those of 32
    few_bits.put(read, before)
    made: dict[str, QuantisedWeight] = {}
    last: tuple[Tensor, Tensor, Tensor] | None = None  # rows, and what comes of them

    def see(name: str, rows: Tensor) -> None:
        nonlocal last
        if name in made:
            return
        if last is None or last[0] is not rows:
            flat = rows.flatten(0, -2)
            last = (rows, *ordered_factor(flat.T @ flat))
        _, order, factor = last
        made[name] = made_up(layers[name].weight.float(), nearest(name, layers[name].weight), order, factor, dtype)
        few_bits.put(read, {name: made[name]})

    see_rows(read, {name: read.get_submodule(name) for name in layers}, [tokens], see)
    return made


def ordered_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The columns in the order in which they are rounded, [in], and U float32 [in, in], an upper triangle, with UT U
    the inverse of ``hessian``, damped and in that order."""
    order = hessian.diagonal().argsort(descending=True)
    damped = hessian[order][:, order].double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() or 1.0)  # of rows that are zero throughout any will do
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return order, torch.linalg.cholesky(inverse, upper=True).float()


def made_up(
    weight: Tensor, nearest: QuantisedWeight, order: Tensor, factor: Tensor, dtype: torch.dtype
) -> QuantisedWeight:
    """``weight`` float32 [out, in] in the kind and blocks of ``nearest``; ``order`` and ``factor``: of
    :func:`ordered_factor`."""
    back = order.argsort()
    scales = _scales(weight, nearest, factor.diagonal()[back].square().reciprocal(), dtype)
    left = weight.T[order]
    steps = scales.T.repeat_interleave(len(left) // scales.shape[1], 0)[order]
    values = torch.empty_like(left, dtype=nearest.values.dtype)
    for begin in range(0, len(left), LAZY):
        end = min(begin + LAZY, len(left))
        lost = torch.empty_like(left[begin:end])
        for at in range(begin, end):
            values[at] = rounded(left[at] / steps[at], nearest.kind)
            lost[at - begin] = (left[at] - values[at] * steps[at]) / factor[at, at]
            left[at + 1 : end].addr_(factor[at, at + 1 : end], lost[at - begin], alpha=-1)
        left[end:].addmm_(factor[begin:end, end:].T, lost, alpha=-1)
    return replace(nearest, values=values[back].T.contiguous(), scales=scales)


def _scales(weight: Tensor, nearest: QuantisedWeight, costs: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 [out, blocks]: of :data:`SHARES` of the scales of ``nearest`` those of least squared error of rounding,
    in which a column counts by its entry of ``costs`` [in]."""
    blocks = weight.reshape(len(weight), nearest.scales.shape[1], -1)
    found, least = nearest.scales, torch.full_like(nearest.scales, torch.inf)
    for share in SHARES:
        scales = numbers_of(dtype, nearest.scales * share)
        steps = scales.unsqueeze(-1)
        errors = rounded(blocks / steps, nearest.kind) * steps - blocks
        cost = (errors.square() * costs.reshape(blocks.shape[1:])).sum(-1)
        found, least = torch.where(cost < least, scales, found), torch.minimum(cost, least)
    return found
