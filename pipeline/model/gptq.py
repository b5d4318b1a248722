"""GPTQ: what rounding a column of a weight loses is made up for by the columns that are not rounded yet.

Frantar and others, ICLR 2023.  What an error of a weight costs depends on the rows that it multiplies: with H the sum
of x xT over the rows x of a text, an error e costs e H eT.  Columns are rounded one after the other, that of the
largest rows first, and the Cholesky factor of H's inverse says how the rest changes best.  The scale of a block is a
share of that at which nothing of it is cut off: the one of least error, in which a column counts by what it cannot hand
on.

The layers are rounded while the model reads the text, each in the moment in which it is called: so its rows are those
that the layers before it give as they are by then.  The same batch has the text twice, and its first half is read by
the weights as they were.  What a layer answers to those rows is what it is to answer to the others (Li and others,
GPTAQ, ICML 2025), so a layer also makes up for what those before it lost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from passes.quantised import QuantisedWeight, numbers_of, rounded
from pipeline.model.calibration import see_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DAMPING = 0.01
"""Of the mean of H's diagonal, added to all of it: GPTQ's."""
LAZY = 128
"""Columns whose errors are handed on together: GPTQ's."""
SHARES = [percent / 100 for percent in range(100, 58, -2)]
"""Of the scale at which nothing is cut off, those that are tried."""


def made_up_for(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Linear],
    tokens: Tensor,
    nearest: Callable[[str, Tensor], QuantisedWeight],
    dtype: torch.dtype,
) -> dict[str, QuantisedWeight]:
    """Layer -> its weight in the kind and blocks that ``nearest`` (a layer's name and a weight [out, in]) gives it, for
    those of ``layers`` that multiply every row when ``model`` reads ``tokens``, int64 [samples, length]; of more calls
    the first counts.

    ``dtype``: whose numbers the scales are, times a power of two.  ``model`` itself stays as it is.  Raises
    :class:`RunError` for rows that are not finite, and as ``nearest``.
    """
    read = copy.deepcopy(model).float()  # on a CPU products of 16 bits take many times those of 32
    read_layers = {name: read.get_submodule(name) for name in layers}
    made: dict[str, QuantisedWeight] = {}
    last: tuple[Tensor, Rows] | None = None  # layers that read the same rows share what is known of them

    def see(name: str, rows: Tensor) -> None:
        nonlocal last
        if name in made or rows[..., 0].numel() != 2 * tokens.numel():  # an expert's rows, of which half cannot be told
            return
        if last is None or last[0] is not rows:
            last = (rows, rows_of(*rows.flatten(0, -2).chunk(2)))
        weight = layers[name].weight.float() @ last[1].aim
        made[name] = made_up(weight, nearest(name, weight), last[1], dtype)

    for name, layer in read_layers.items():
        vars(layer)["forward"] = partial(_half_rounded, layer, made, name)
    see_rows(read, read_layers, [torch.cat([tokens, tokens])], see)
    return made


def _half_rounded(layer: nn.Linear, made: Mapping[str, QuantisedWeight], name: str, rows: Tensor) -> Tensor:
    """What ``layer`` answers to the first half of ``rows`` [batch, ..., in], and to the other with its weight in
    ``made``, where that has one."""
    if name not in made:
        return linear(rows, layer.weight, layer.bias)
    before, after = rows.chunk(2)
    small = made[name].dequantised(torch.float32)
    return torch.cat([linear(before, layer.weight, layer.bias), linear(after, small, layer.bias)])


@dataclass(frozen=True)
class Rows:
    """What decides how a weight is rounded that multiplies them."""

    aim: Tensor
    """float32 [in, in]: a weight [out, in] times this answers to the rows what it answered before, as near as can
    be."""
    order: Tensor
    """[in]: the columns, as they are rounded."""
    factor: Tensor
    """float32 [in, in], in that order: an upper triangle U, with UT U the inverse of H."""


def rows_of(before: Tensor, after: Tensor) -> Rows:
    """Of rows float32 [n, in], as they were and as they are once the layers before are rounded."""
    hessian = (after.T @ after).double()
    order = hessian.diagonal().argsort(descending=True)
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean() or 1.0)  # of rows that are zero throughout any will do
    lower = torch.linalg.cholesky(hessian[order][:, order])
    factor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    lost = ((before - after).T @ after).double()
    aim = torch.eye(len(order), dtype=lost.dtype, device=lost.device) + torch.linalg.solve(hessian, lost, left=False)
    return Rows(aim.float(), order, factor.float())


def made_up(weight: Tensor, nearest: QuantisedWeight, seen: Rows, dtype: torch.dtype) -> QuantisedWeight:
    """``weight`` float32 [out, in], which multiplies the rows ``seen``, in the kind and blocks of ``nearest``."""
    factor, back = seen.factor, seen.order.argsort()
    scales = _scales(weight, nearest, factor.diagonal()[back].square().reciprocal(), dtype)
    left = weight.T[seen.order]
    steps = scales.T.repeat_interleave(len(left) // scales.shape[1], 0)[seen.order]
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
