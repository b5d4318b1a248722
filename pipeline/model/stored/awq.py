"""AWQ checkpoints of AutoAWQ: ``quant_method: awq``, version ``gemm``.

``qweight`` int32 [in, out / 8] and ``qzeros`` int32 [groups, out / 8] are packed along the output, eight channels to a
word in the order 0, 2, 4, 6, 1, 3, 5, 7; ``scales`` [groups, out] (AutoAWQ's ``modules/linear/gemm.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.model.stored.format import Format, Settings, one_of
from pipeline.model.stored.grid import Grid, in_groups, unpacked

PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in its word each of eight channels stands."""


def read(settings: Settings) -> Format:
    bits = one_of("bits", settings.get("bits", settings.get("w_bit")), (4,))
    one_of("version", str(settings.get("version", "gemm")).lower(), ("gemm",))

    def layer(parts: Mapping[str, Tensor]) -> Grid:
        scales = parts["scales"].T
        channels, count = scales.shape
        values, zeros = (_channels(parts[name], channels) for name in ("qweight", "qzeros"))
        return Grid(values, scales, zeros, in_groups(values.shape[1], count))

    return Format(f"AWQ int{bits}", "qweight", ("qzeros", "scales"), (), layer)


def _channels(words: Tensor, channels: int) -> Tensor:
    """int16 [channels, n] of ``words`` int32 [n, channels / 8]."""
    stored = unpacked(words, 4, channels)
    return stored.unflatten(-1, (-1, 8))[..., PLACES].flatten(-2).T
