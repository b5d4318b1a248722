"""GPTQ checkpoints of AutoGPTQ and GPTQModel: ``quant_method: gptq``.

``qweight`` int32 [in * bits / 32, out] is packed along the input and ``qzeros`` int32 [groups, out * bits / 32] along
the output; ``scales`` [groups, out]; ``g_idx`` int32 [in] is the group of each input, which ``desc_act`` puts in an
order of its own.  The first form of the format stores each zero point less 1, ``gptq_v2`` as it is (GPTQModel's
``nn_modules/qlinear`` and ``convert_gptq_v1_to_v2_format_module``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.model.stored.format import Format, Settings, one_of
from pipeline.model.stored.grid import Grid, in_groups, unpacked

BITS = (2, 3, 4, 8)


def read(settings: Settings) -> Format:
    bits = one_of("bits", settings.get("bits"), BITS)
    version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    one_of("checkpoint_format", version, ("gptq", "gptq_v2"))
    own: Any = settings.get("dynamic") or {}
    if any(isinstance(rule, dict) and rule for rule in own.values()):
        raise ValueError("dynamic gives layers bits of their own, which is not read")

    def layer(parts: Mapping[str, Tensor]) -> Grid:
        words, scales = parts["qweight"], parts["scales"].T
        channels, count = scales.shape
        inner = words.shape[0] * 32 // bits
        values = unpacked(words.T.contiguous(), bits, inner)
        zeros = unpacked(parts["qzeros"], bits, channels).T
        if version == "gptq":
            zeros = (zeros + 1) & (2**bits - 1)
        groups = parts["g_idx"].long() if "g_idx" in parts else in_groups(inner, count)
        return Grid(values, scales, zeros, groups)

    return Format(f"GPTQ int{bits}", "qweight", ("qzeros", "scales"), ("g_idx",), layer)
