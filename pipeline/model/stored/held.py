"""Which quantised weights an engine can hold as they came, with the numbers of their own."""

from __future__ import annotations

import torch

from passes.precision import FEW_BITS, Kind
from passes.quantised import QuantisedWeight, numbers_of
from pipeline.model.stored.grid import Grid, in_groups

BLOCKS = next(few.blocks for few in FEW_BITS.values() if few.kind == "int4")
LIMITS = {"int8": (-128, 127), "int4": (-8, 7)}


def held(grid: Grid, kind: Kind, dtype: torch.dtype) -> QuantisedWeight | None:
    """``grid`` as a weight of ``kind``; None where it is none: TensorRT takes no zero points and no order of inputs,
    int8 and E4M3 with a scale for each channel, int4 with one for each block.

    A zero point is no hindrance where values less zero point fit the type, as of symmetric GPTQ they do.  A scale
    becomes a number of ``dtype``, times a power of two, as :mod:`passes.quantised` has them.  Of E4M3 the scale of rows
    is still to be measured where the checkpoint has none.
    """
    count, inner = grid.scales.shape[1], grid.values.shape[1]
    if inner % count or not torch.equal(grid.groups, in_groups(inner, count)):
        return None
    if not bool((grid.scales > 0).all()) or (grid.row_factors is not None and not bool((grid.row_factors > 0).all())):
        return None
    values, scales = grid.values, numbers_of(dtype, grid.scales.float())
    if kind == "e4m3":
        if values.dtype != torch.float8_e4m3fn or count != 1:
            return None
    else:
        if values.dtype != torch.int16:
            return None
        if grid.zeros is not None:
            values = values - grid.zeros[:, grid.groups]
        low, high = LIMITS[kind]
        if int(values.min()) < low or int(values.max()) > high:
            return None
        values = values.to(torch.int8)
        if kind == "int8" and count != 1:
            return None
        if kind == "int4":
            block = next((each for each in BLOCKS if (inner // count) % each == 0), None)
            if block is None:
                return None
            scales = scales.repeat_interleave(inner // count // block, 1)
    factors = None if grid.row_factors is None else grid.row_factors.float()
    return QuantisedWeight(kind, values.contiguous(), scales, factors, grid.row_scale if kind == "e4m3" else None)
