"""A quantised weight as every format means it: values, scales and zero points over groups of the input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 32
"""Bits of the words that values are packed into."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The weight [out, in] of a linear layer: ``(values - zeros) * scales``, each of its group.

    Raises :class:`ValueError`, whose text says what is wrong, where the parts are no such weight.
    """

    values: Tensor
    """[out, in]: whole numbers (int16), or ``float8_e4m3fn``."""
    scales: Tensor
    """Floats [out, groups]."""
    zeros: Tensor | None
    """Whole numbers [out, groups]; None: 0."""
    groups: Tensor
    """int64 [in]: the group of each input."""
    row_factors: Tensor | None = None
    """Floats [in], by which the layer's rows are multiplied before the product; None: by nothing."""
    row_scale: float | None = None
    """The scale at which rows are meant to be rounded to E4M3, where the checkpoint has one."""

    def __post_init__(self) -> None:
        channels, inner = self.values.shape
        count = self.scales.shape[-1]
        if self.scales.shape != (channels, count):
            raise ValueError(f"scales of {list(self.scales.shape)} do not fit a weight of {list(self.values.shape)}")
        for what, numbers in (("scales", self.scales), ("factors", self.row_factors), ("values", self.values)):
            if numbers is not None and not bool(numbers.float().isfinite().all()):
                raise ValueError(f"its {what} are not all finite")
        if self.zeros is not None and self.zeros.shape != self.scales.shape:
            raise ValueError(f"zero points of {list(self.zeros.shape)} for scales of {list(self.scales.shape)}")
        if self.groups.shape != (inner,) or int(self.groups.min()) < 0 or int(self.groups.max()) >= count:
            raise ValueError(f"an input of {inner} does not belong to {count} groups")
        if self.row_factors is not None and self.row_factors.shape != (inner,):
            raise ValueError(f"{list(self.row_factors.shape)} factors for an input of {inner}")

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], in float32 and rounded once to ``dtype``.

        A product of so few bits and a scale of fp16 or bf16 is exact in float32, so this is what libraries get that
        multiply in the scales' own type.
        """
        values = self.values.float()
        if self.zeros is not None:
            values -= self.zeros.float()[:, self.groups]
        values *= self.scales.float()[:, self.groups]
        return (values if self.row_factors is None else values * self.row_factors.float()).to(dtype)


def in_groups(inner: int, count: int) -> Tensor:
    """int64 [inner]: ``count`` equal groups, one after the other; raises :class:`ValueError` where they are not."""
    if count < 1 or inner % count:
        raise ValueError(f"{count} groups do not divide an input of {inner}")
    return torch.arange(inner) // (inner // count)


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` of the unsigned numbers of ``bits`` that stand one behind the other, the lowest bits first,
    in ``words`` int32 [..., n]; int16 [..., count].  One may begin in a word and end in the next."""
    if words.dtype != torch.int32 or words.shape[-1] * WORD < count * bits:
        raise ValueError(f"{list(words.shape)} words of {words.dtype} do not hold {count} numbers of {bits} bits")
    first = torch.arange(count) * bits
    place, offset = first // WORD, first % WORD
    wide = words.long() & 0xFFFFFFFF
    after = torch.nn.functional.pad(wide, (0, 1))[..., place + 1]
    pair = wide[..., place] | (after << WORD)  # the upper half of the second is cut off where it is not needed
    return ((pair >> offset) & (2**bits - 1)).short()
