"""Checkpoints in E4M3 with a scale for each square block, as DeepSeek V3 is published: ``quant_method: fp8``.

``weight`` E4M3 [out, in] and ``weight_scale_inv``, one for each block of ``weight_block_size``, by which it is
multiplied, whatever its name says (DeepSeek's ``inference/kernel.py``, ``weight_dequant``).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.model.stored.format import Format, Settings, one_of, two_sizes
from pipeline.model.stored.grid import Grid
from pipeline.model.stored.scaled import scaled


def read(settings: Settings) -> Format:
    one_of("fmt", settings.get("fmt") or "e4m3", ("e4m3",))
    block = two_sizes("weight_block_size", settings.get("weight_block_size"))

    def layer(parts: Mapping[str, Tensor]) -> Grid:
        return scaled(parts["weight"], parts["weight_scale_inv"], None, block)

    return Format("fp8 in blocks", "weight", ("weight_scale_inv",), (), layer, ("input_scale",), rounds_rows=True)
