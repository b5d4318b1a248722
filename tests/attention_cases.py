"""Attention calls in every form that PyTorch takes and Torch-TensorRT's own converters know, in programs of many."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn.functional import scaled_dot_product_attention

BATCH, LONGEST = 2, 24
QUERIES, KEYS = 12, 20

MASKS: dict[str, tuple[str, str]] = {
    # name: sizes, with B, H, L and S, and what is in it
    "none": ("", ""),
    "causal": ("", ""),
    "bool of rank 2": ("L S", "bool"),
    "bool of rank 3": ("H L S", "bool"),
    "bool of rank 4": ("B H L S", "bool"),
    "bool for a batch": ("B 1 L S", "bool"),
    "bool of keys": ("B 1 1 S", "bool"),
    "bool of keys, expanded": ("B 1 1 S", "bool"),
    "bool of queries": ("B 1 L 1", "bool"),
    "bool with rows that see nothing": ("B 1 L S", "bool with rows that see nothing"),
    "added, rank 2": ("L S", "float"),
    "added, rank 4": ("1 H L S", "float"),
    "added, of keys": ("1 H 1 S", "float"),
    "added, with rows that see nothing": ("B 1 L S", "float with rows that see nothing"),
}
HEADS = {"heads": (4, 4), "grouped heads": (4, 2), "one key head": (4, 1)}


class Case(NamedTuple):
    mask: str
    heads: tuple[int, int]
    size: int
    scale: float | None


class Family(NamedTuple):
    """What all cases of one program share."""

    dtype: torch.dtype
    dynamic: bool
    lengths: str
    """``same``: as many queries as keys; ``fewer``: less queries than keys; ``one``: a single query."""

    def __str__(self) -> str:
        kind = "dynamic" if self.dynamic else "static"
        return f"{str(self.dtype).removeprefix('torch.')}, {kind}, {self.lengths}"


FAMILIES = [
    Family(torch.float16, False, "same"),
    Family(torch.float16, True, "same"),
    Family(torch.float16, True, "fewer"),
    Family(torch.float16, True, "one"),
    Family(torch.bfloat16, True, "same"),
    Family(torch.bfloat16, False, "fewer"),
    Family(torch.float32, False, "same"),
    Family(torch.float32, True, "fewer"),
]


def cases(family: Family) -> Iterator[Case]:
    """Every mask, with head counts, head sizes (one is no power of two) and scales in turn."""
    turn = itertools.cycle(itertools.product(HEADS.values(), ((16, None), (24, 0.3), (64, None), (80, 0.05))))
    for mask in MASKS:
        for heads, (size, scale) in itertools.islice(turn, 2):
            yield Case(mask, heads, size, scale)


class Calls(nn.Module):
    """Every case on its own query, key and value, which come as [B, N, H * D]: a -1 hides the heads."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.cases = list(cases(family))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        given = iter(inputs)
        return [self.attention(case, given) for case in self.cases]

    def attention(self, case: Case, given: Iterator[Tensor]) -> Tensor:
        query, key, value = (next(given).unflatten(2, (-1, case.size)).transpose(1, 2) for _ in range(3))
        mask = next(given) if MASKS[case.mask][0] else None
        if mask is not None and case.mask.endswith("expanded"):
            mask = mask.expand(-1, -1, query.shape[2], -1)
        return scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            is_causal=case.mask == "causal",
            scale=case.scale,
            enable_gqa=case.heads[0] != case.heads[1],
        )


def lengths(family: Family, longest: bool = False) -> tuple[int, int]:
    queries, keys = (LONGEST, LONGEST + KEYS - QUERIES) if longest else (QUERIES, KEYS)
    return {"same": (queries, queries), "fewer": (queries, keys), "one": (1, keys)}[family.lengths]


def inputs(family: Family, queries: int, keys: int, seed: int = 0) -> list[Tensor]:
    """Of every case the query, key and value, each [B, N, H * D], and its mask."""
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for case in cases(family):
        for heads, count in zip((case.heads[0], case.heads[1], case.heads[1]), (queries, keys, keys), strict=True):
            found.append(torch.randn(BATCH, count, heads * case.size, generator=generator).to(family.dtype))
        sizes, content = MASKS[case.mask]
        if sizes:
            known = {"B": BATCH, "H": case.heads[0], "L": queries, "S": keys, "1": 1}
            found.append(_mask([known[size] for size in sizes.split()], content, family.dtype, generator))
    return found


def _mask(shape: list[int], content: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    sees = torch.rand(shape, generator=generator) < 0.7
    sees[..., 0] = True
    if "nothing" in content:
        sees[..., :: max(shape[-2] // 3, 1), :] = False
    if content.startswith("bool"):
        return sees
    return torch.randn(shape, generator=generator).masked_fill(~sees, -math.inf).to(dtype)


def exported(family: Family) -> ExportedProgram:
    queries, keys = lengths(family)
    dynamic: Any = None
    if family.dynamic:
        one = Dim("queries", min=2, max=LONGEST)
        other = one if family.lengths == "same" else Dim("keys", min=2, max=LONGEST + KEYS - QUERIES)
        each: list[dict[int, Any]] = []
        for case in cases(family):
            length = {} if family.lengths == "one" else {1: one}
            each += [length, {1: other}, {1: other}]
            sizes = MASKS[case.mask][0].split()
            if sizes:
                named = {"L": None if family.lengths == "one" else one, "S": other}
                each.append({axis: named[size] for axis, size in enumerate(sizes) if named.get(size) is not None})
        dynamic = (tuple(each),)
    with torch.no_grad():
        return export(Calls(family).eval(), tuple(inputs(family, queries, keys)), dynamic_shapes=dynamic, strict=False)
