"""A weight of fewer bits: whole numbers or E4M3 floats, and the scales that make it a weight again.

Symmetric throughout: a weight is value times scale, and no zero point is added, since TensorRT's dequantisation takes
none.  A graph holds such a weight as its values and scales, behind one operation of ours
(``proved_attention::dequantised``), from the trace to the engine: so the proof, every pass, the verification and
TensorRT see the same numbers.

Round to nearest: the scale is the least at which nothing of a channel, or of a block of one, is cut off.  (That of the
least squared error is worse where it counts: with it the perplexity of SmolLM2-135M in int4, blocks of 64, rose by 56 %
where it rose by 42; that all 16 numbers are used made that 37.)  Scales are numbers of the model's own type, times a
power of two, so that an engine, which multiplies by them in that type, multiplies by the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from passes.precision import Kind

LARGEST: dict[Kind, float] = {"int8": 127, "int4": 7, "e4m3": 448}
"""The largest magnitude that both signs have; of E4M3: OCP's OFP8 specification."""
LOWEST: dict[Kind, float] = {"int4": 8}
"""The largest below 0, where that is another: of 16 numbers none is left unused."""
LEAST = 2.0**-100
"""The scale of what is zero throughout."""
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """The weight [out, in] of a product, or a table [tokens, in] whose rows are looked up.

    Raises :class:`ValueError`, whose text says what is wrong, where the parts are no such weight.
    """

    kind: Kind
    values: Tensor
    """[out, in]: int8 for ``int8`` and ``int4`` (-8 to 7, one a byte), ``float8_e4m3fn`` for ``e4m3``."""
    scales: Tensor
    """float32 [out, blocks]: one a channel, or one for each of so many equal blocks along the input."""
    row_factors: Tensor | None = None
    """float32 [in]: what the rows are multiplied by before the product, as AWQ has it; None: nothing."""
    row_scale: float | None = None
    """The scale at which the rows are rounded to E4M3 before the product; None: they are taken as they are."""

    def __post_init__(self) -> None:
        wanted = E4M3 if self.kind == "e4m3" else torch.int8
        if self.values.dim() != 2 or self.values.dtype != wanted:
            raise ValueError(f"{self.kind} values must be a matrix of {wanted}, not {tuple(self.values.shape)} of "
                             f"{self.values.dtype}")  # fmt: skip
        channels, inner = self.values.shape
        if self.scales.dim() != 2 or len(self.scales) != channels or inner % max(self.scales.shape[1], 1):
            raise ValueError(f"scales of {tuple(self.scales.shape)} do not fit values of {tuple(self.values.shape)}")
        for what, numbers in (("scales", self.scales), ("factors of the rows", self.row_factors)):
            if numbers is not None and not bool((numbers.isfinite() & (numbers > 0)).all()):
                raise ValueError(f"{what} are not all finite and above 0")
        if self.row_factors is not None and self.row_factors.shape != (inner,):
            raise ValueError(f"{tuple(self.row_factors.shape)} factors do not fit rows of {inner}")

    @property
    def block(self) -> int | None:
        """Elements along the input that share a scale; None: a whole channel does."""
        blocks = self.scales.shape[1]
        return None if blocks == 1 else self.values.shape[1] // blocks

    @property
    def bytes(self) -> int:
        """As an engine holds the values: two of int4 in a byte."""
        return self.values.numel() // (2 if self.kind == "int4" else 1)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] of ``dtype``: product of float32, rounded once."""
        return in_aten(self.values, self.scales, self.kind, dtype)

    def to(self, device: torch.device) -> QuantisedWeight:
        """The same on ``device``."""
        factors = None if self.row_factors is None else self.row_factors.to(device)
        return QuantisedWeight(self.kind, self.values.to(device), self.scales.to(device), factors, self.row_scale)


def to_nearest(weight: Tensor, kind: Kind, block: int | None, dtype: torch.dtype) -> QuantisedWeight:
    """``weight`` [out, in] rounded to nearest, in blocks of ``block`` along the input or, None, whole channels.

    ``dtype``: whose numbers the scales are, times a power of two.  Raises :class:`ValueError` where the blocks do not
    divide the input, or the weight is not finite.
    """
    channels, inner = weight.shape
    if block is not None and inner % block:
        raise ValueError(f"blocks of {block} do not divide its input of {inner}")
    if not bool(weight.isfinite().all()):
        raise ValueError("it has weights that are no finite numbers")
    blocks = weight.float().reshape(channels, -1, block or inner)
    highest, lowest = LARGEST[kind], LOWEST.get(kind, LARGEST[kind])
    scales = numbers_of(dtype, torch.maximum(blocks.amax(-1) / highest, -blocks.amin(-1) / lowest)).clamp(min=LEAST)
    return QuantisedWeight(kind, rounded(blocks / scales[..., None], kind).reshape(channels, inner), scales)


def numbers_of(dtype: torch.dtype, scales: Tensor) -> Tensor:
    """``scales`` float32, rounded to numbers of ``dtype`` times a power of two."""
    parts, exponents = torch.frexp(scales)
    return torch.ldexp(parts.to(dtype).float(), exponents)


def rounded(numbers: Tensor, kind: Kind) -> Tensor:
    """``numbers``, already divided by their scale, as values of ``kind``."""
    largest = LARGEST[kind]
    if kind == "e4m3":
        return numbers.clamp(-largest, largest).to(E4M3)
    return numbers.round().clamp(-LOWEST.get(kind, largest), largest).to(torch.int8)


@torch.library.custom_op("proved_attention::dequantised", mutates_args=())
def dequantised(values: Tensor, scales: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The weight of :class:`QuantisedWeight` in a graph: its parts and ``kind`` stay to be seen."""
    return in_aten(values, scales, kind, dtype)


def in_aten(values: Tensor, scales: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """What :func:`dequantised` computes, in torch's own words."""
    channels, inner = values.shape
    blocks = values.float().reshape(channels, -1, inner // scales.shape[1]) * scales.unsqueeze(-1)
    return blocks.reshape(channels, inner).to(dtype)


@dequantised.register_fake
def _(values: Tensor, scales: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    return values.new_empty(values.shape, dtype=dtype)


@torch.library.custom_op("proved_attention::rows_in_e4m3", mutates_args=())
def rows_in_e4m3(rows: Tensor, scale: float) -> Tensor:
    """``rows`` [..., in] rounded to the numbers that E4M3 has at ``scale``; what is larger is cut off."""
    return rows_in_aten(rows, scale)


def rows_in_aten(rows: Tensor, scale: float) -> Tensor:
    """What :func:`rows_in_e4m3` computes, in torch's own words."""
    largest = LARGEST["e4m3"]
    return ((rows.float() / scale).clamp(-largest, largest).to(E4M3).float() * scale).to(rows.dtype)


@rows_in_e4m3.register_fake
def _(rows: Tensor, scale: float) -> Tensor:
    return torch.empty_like(rows)


DEQUANTISED = torch.ops.proved_attention.dequantised.default
ROWS_IN_E4M3 = torch.ops.proved_attention.rows_in_e4m3.default
WITHOUT_FEW_BITS = {DEQUANTISED: in_aten}
"""Has lowering write the weights of fewer bits out, and fold them to those that they stand for."""
