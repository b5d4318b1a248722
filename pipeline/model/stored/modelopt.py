"""Checkpoints of NVIDIA ModelOpt: ``hf_quant_config.json``, or ``quant_method: modelopt``.

``weight`` is E4M3 or int8 [out, in] with ``weight_scale``, one or one a channel, or, of ``W4A16_AWQ``, uint8
[out / 2, in] with two channels a byte, the lower bits first, and ``weight_scale`` [out, groups].  ``pre_quant_scale``
[in] multiplies the rows (the library's ``torch/export/quant_utils.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.model.stored.format import Format, Settings, one_of
from pipeline.model.stored.grid import Grid, in_groups
from pipeline.model.stored.scaled import of_rows, scaled

NAMES = {
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8",
    "W8A16": "int8",
    "W8A8_SQ_PER_CHANNEL": "int8",
    "W4A16_AWQ": "int4",
}
UNUSED = ("k_scale", "v_scale", "k_proj.k_scale", "v_proj.v_scale", "output_scale")


def read(settings: Settings) -> Format:
    algorithm = one_of("quant_algo", settings.get("quant_algo"), tuple(NAMES))

    def layer(parts: Mapping[str, Tensor]) -> Grid:
        grid = (_two_a_byte if algorithm == "W4A16_AWQ" else scaled)(parts["weight"], parts["weight_scale"])
        row_scale = of_rows(parts.get("input_scale")) if algorithm == "FP8" else None
        return replace(grid, row_factors=parts.get("pre_quant_scale"), row_scale=row_scale)

    rows = algorithm not in ("W8A16", "W4A16_AWQ")
    return Format(
        f"ModelOpt {NAMES[algorithm]}",
        "weight",
        ("weight_scale",),
        ("pre_quant_scale", "input_scale"),
        layer,
        UNUSED,
        rows,
    )


def _two_a_byte(values: Tensor, scales: Tensor) -> Grid:
    if values.dim() != 2 or values.dtype != torch.uint8:
        raise ValueError(f"its weight {list(values.shape)} of {values.dtype} is no matrix of bytes")
    halves = torch.stack([values & 15, values >> 4], 1).flatten(0, 1).short()
    return Grid((halves ^ 8) - 8, scales, None, in_groups(values.shape[1], scales.shape[-1]))
