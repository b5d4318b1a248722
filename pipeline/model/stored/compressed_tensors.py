"""Checkpoints of llm-compressor: ``quant_method: compressed-tensors``.

``pack-quantized`` has ``weight_packed`` int32 [out, in * bits / 32], signed numbers above their least, packed along the
input, with ``weight_shape``; zero points are packed likewise along the output.  ``int-quantized``,
``float-quantized`` and ``naive-quantized`` have ``weight`` as int8 or E4M3.  ``weight_scale`` is [1], [out, 1],
[out, groups], or one for each square block; ``weight_g_idx`` gives inputs a group of their own (the library's
``compressors`` and ``quantization/lifecycle/forward.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.model.stored.format import Format, Settings, one_of, two_sizes
from pipeline.model.stored.grid import Grid, in_groups, unpacked
from pipeline.model.stored.scaled import of_rows, scaled

PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized")
UNUSED = ("input_zero_point", "input_global_scale", "output_scale", "k_scale", "v_scale", "q_scale")


def read(settings: Settings) -> Format:
    groups: list[Any] = list((settings.get("config_groups") or {}).values())
    weights = [group["weights"] for group in groups if isinstance(group, dict) and group.get("weights")]
    if len(weights) != len(groups) or not weights or any(each != weights[0] for each in weights):
        raise ValueError("config_groups of which none, or not all the same, are for weights")
    of = dict(weights[0])
    form = one_of("format", settings.get("format") or groups[0].get("format"), FORMATS)
    kind = one_of("type", of.get("type", "int"), ("int", "float"))
    allowed = tuple(range(2, 9)) if form == PACKED else (8,)
    bits = one_of("num_bits", of.get("num_bits"), allowed)
    strategy = one_of("strategy", of.get("strategy"), ("tensor", "channel", "group", "block"))
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    one_of("sparsity_config.format", sparsity, ("dense",))
    block = two_sizes("block_structure", of.get("block_structure")) if strategy == "block" else None
    rows = any(group.get("input_activations") for group in groups)
    needed = ("weight_scale", *(() if of.get("symmetric", True) else ("weight_zero_point",)))

    def packed(parts: Mapping[str, Tensor]) -> Grid:
        channels, inner = map(int, parts["weight_shape"].tolist())
        scales = parts["weight_scale"]
        scales = scales.reshape(1, 1).expand(channels, 1) if scales.numel() == 1 else scales
        least = 2 ** (bits - 1)
        values = unpacked(parts["weight_packed"], bits, inner) - least
        zeros = parts.get("weight_zero_point")
        if zeros is not None and zeros.dtype == torch.int32:
            zeros = (unpacked(zeros.T.contiguous(), bits, channels) - least).T
        elif zeros is not None:  # of a whole tensor it is not packed
            zeros = zeros.short().reshape(1, 1).expand(channels, 1)
        order = parts.get("weight_g_idx")
        if order is not None and int(order.min()) < 0:  # not in use
            order = None
        return Grid(values, scales, zeros, in_groups(inner, scales.shape[1]) if order is None else order.long())

    def plain(parts: Mapping[str, Tensor]) -> Grid:
        grid = scaled(parts["weight"], parts["weight_scale"], parts.get("weight_zero_point"), block)
        return replace(grid, row_scale=of_rows(parts.get("input_scale")))

    name = f"compressed-tensors {'fp' if kind == 'float' else 'int'}{bits}"
    if form == PACKED:
        return Format(
            name, "weight_packed", (*needed, "weight_shape"), ("weight_g_idx",), packed, (*UNUSED, "input_scale"), rows
        )
    return Format(name, "weight", needed, ("input_scale",), plain, UNUSED, rows)
