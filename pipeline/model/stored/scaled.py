"""Weights stored as int8 or E4M3 numbers beside their scales: one for all, or for each channel, group or block."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.model.stored.grid import Grid, in_groups

KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


def of_rows(scale: Tensor | None) -> float | None:
    """The one scale of a layer's rows, where that is what ``scale`` is."""
    return float(scale) if scale is not None and scale.numel() == 1 and 0 < float(scale) < float("inf") else None


def scaled(values: Tensor, scales: Tensor, zeros: Tensor | None = None, block: tuple[int, int] | None = None) -> Grid:
    """``values`` [out, in] by ``scales`` of one element, [out], [out, groups], or, with ``block``, for each block of
    that many rows and columns, the last ones cut off."""
    if values.dim() != 2 or values.dtype not in KINDS:
        raise ValueError(f"its weight {list(values.shape)} of {values.dtype} is no matrix of int8 or E4M3 numbers")
    whole = values.short() if values.dtype == torch.int8 else values
    channels, inner = values.shape
    if block is not None:
        rows, columns = block
        if scales.shape != (-(-channels // rows), -(-inner // columns)):
            raise ValueError(f"scales of {list(scales.shape)} for {list(values.shape)} in blocks of {rows}x{columns}")
        return Grid(whole, scales.repeat_interleave(rows, 0)[:channels], None, torch.arange(inner) // columns)
    if scales.numel() == 1:
        scales = scales.reshape(1, 1).expand(channels, 1)
    elif scales.dim() == 1:
        scales = scales[:, None]
    if zeros is not None:
        zeros = zeros.short().reshape(-1, 1).expand(channels, 1) if zeros.numel() == 1 else zeros.short()
        zeros = zeros.reshape(scales.shape) if zeros.numel() == scales.numel() else zeros
    return Grid(whole, scales, zeros, in_groups(inner, scales.shape[-1]))
