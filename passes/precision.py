"""The precisions that a run can have: an entry each, read by all that depends on it.

Only the names are needed where settings are checked, so torch is imported when a type of its own is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Products = Literal["fp16_accumulation", "tf32"]
Kind = Literal["int8", "int4", "e4m3"]


@dataclass(frozen=True)
class Precision:
    name: str
    """As it is typed, and as reports have it."""
    torch_name: str
    """Torch's name of the weights' type."""
    reference_name: str
    """Torch's name of the next wider type, in which the same weights, never rounded to this one, judge a run."""
    bytes: int
    """Of one element."""
    epsilon: float
    """The distance from 1 to the next larger number; source: IEEE 754, and for bf16 its eight bits of precision."""
    rtx_products: Products | None = None
    """How TensorRT-RTX multiplies matrices, where that is not PyTorch's own way: :mod:`pipeline.verify.arithmetic`."""

    @property
    def unit_roundoff(self) -> float:
        """The largest relative error of rounding to it."""
        return self.epsilon / 2

    @property
    def is_narrow(self) -> bool:
        """Whether it has 16 bits: PyTorch adds up its products in fp32 and rounds the sum."""
        return self.bytes == 2

    @property
    def is_full(self) -> bool:
        """Whether it is fp32, which TF32 would shorten: fp32 means fp32."""
        return self.torch_name == "float32"

    @property
    def dtype(self) -> torch.dtype:
        return _torch_type(self.torch_name)

    @property
    def reference_dtype(self) -> torch.dtype:
        return _torch_type(self.reference_name)


def _torch_type(name: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


PRECISIONS = {
    each.name: each
    for each in (
        Precision("fp16", "float16", "float32", 2, 2.0**-10, rtx_products="fp16_accumulation"),
        Precision("bf16", "bfloat16", "float32", 2, 2.0**-7),
        Precision("fp32", "float32", "float64", 4, 2.0**-23, rtx_products="tf32"),
    )
}
"""By name, the default first."""


@dataclass(frozen=True)
class FewBits:
    """Weights of fewer bits under one of :data:`PRECISIONS`, in which everything else is computed."""

    name: str
    """As it is typed, and as reports have it."""
    kind: Kind
    """What a weight is stored as: :mod:`passes.quantised`."""
    bits: int
    blocks: tuple[int, ...] = ()
    """Elements along the input that share a scale, where nothing else is asked for the first that divides every layer;
    none: a whole channel does."""
    methods: tuple[str, ...] = ("round",)
    """How weights may be rounded, the default first."""
    rounds_rows: bool = False
    """Whether the rows that they are multiplied with are rounded too, at scales that are measured on text."""

    def calibrated(self, method: str | None) -> bool:
        """Whether rows of text are looked at, with ``method`` asked for."""
        return self.rounds_rows or (method in self.methods and method != self.methods[0])


FEW_BITS = {
    each.name: each
    for each in (
        FewBits("int8_weights", "int8", 8),
        FewBits("int4_weights", "int4", 4, (128, 64, 32), ("round", "gptq", "awq")),
        FewBits("fp8", "e4m3", 8, rounds_rows=True),
    )
}
BASES = tuple(name for name, each in PRECISIONS.items() if each.is_narrow)
"""What they may be under, the default first."""


def number_type(precision: str, base: str | None) -> str:
    """Which of :data:`PRECISIONS` a run computes in whose ``precision`` may be one of :data:`FEW_BITS`."""
    return (base or BASES[0]) if precision in FEW_BITS else precision
