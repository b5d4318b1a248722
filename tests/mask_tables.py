"""Brute force: whether concrete masks are of a class of ``passes.proof.masks``, recomputed from the definitions
there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Table(NamedTuple):
    """One mask in full: where it attends, and whether it blocks everywhere else."""

    attends: Tensor
    is_mask: bool


def table_of(mask: Tensor) -> Table:
    if mask.dtype == torch.bool:
        return Table(mask, True)
    allowed, blocked = mask == 0, mask <= torch.finfo(mask.dtype).min
    return Table(allowed, bool((allowed | blocked).all()))


def places(table: Tensor) -> tuple[Tensor, Tensor]:
    """p [L, 1], the place of each query among the keys, and k [1, S]."""
    queries, keys = table.shape
    return torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)[None]


def is_packed(table: Tensor) -> bool:
    """Whether there are segments of which ``table`` [L, S] is causal attention."""
    p, k = places(table)
    segment = list(range(table.shape[1]))
    for query, key in torch.nonzero(table).tolist():
        old, new = segment[key], segment[query + table.shape[1] - table.shape[0]]
        segment = [new if each == old else each for each in segment]
    same = torch.tensor(segment)
    return torch.equal(table, (k <= p) & (same[None] == same[p]))


def for_one(numbers: range, predicate: Callable[[Tensor, Tensor, int], Tensor], found: list[Tensor]) -> bool:
    """Whether one number makes ``predicate`` right for all masks."""
    return any(all(torch.equal(table, predicate(*places(table), number)) for table in found) for number in numbers)


def is_offset(table: Tensor) -> bool:
    return for_one(range(-16, 16), lambda p, k, t: k <= p - _past(table) + t, [table])


def is_offset_window(tables: list[Tensor]) -> bool:
    """Whether every table is a window of one width behind a place of its own."""
    return any(
        all(
            for_one(range(-16, 16), lambda p, k, t: (k <= p - _past(x) + t) & (p - _past(x) + t - k < width), [x])  # noqa: B023
            for x in tables
        )
        for width in range(1, 16)
    )


def is_ring(tables: list[Tensor]) -> bool:
    """Whether every table shows the latest of the tokens up to a place of its own, as many in each."""

    def shows(p: Tensor, k: Tensor, t: int, table: Tensor, width: int) -> Tensor:
        place = p - _past(table) + t
        age = (place - k) % table.shape[1]
        return (age <= place) & (age < width)

    return any(
        all(for_one(range(48), lambda p, k, t: shows(p, k, t, x, width), [x]) for x in tables)  # noqa: B023
        for width in range(1, 16)
    )


def _past(table: Tensor) -> int:
    return table.shape[1] - table.shape[0]


# The classes of passes/proof/masks.py, recomputed from their definitions there.
CLASSES: dict[str, Callable[[list[Tensor]], bool]] = {
    "full": lambda found: all(bool(table.all()) for table in found),
    "causal": lambda found: all(torch.equal(t, torch.ones_like(t).tril()) for t in found),
    "causal_lower_right": lambda found: all(torch.equal(t, k <= p) for t in found for p, k in [places(t)]),
    "sliding_window": lambda found: for_one(range(1, 16), lambda p, k, w: (k <= p) & (p - k < w), found),
    "chunked": lambda found: for_one(range(1, 16), lambda p, k, c: (k <= p) & (k // c == p // c), found),
    "padding": lambda found: all(torch.equal(t, (k <= p) & t[-1]) for t in found for p, k in [places(t)]),
    "packed": lambda found: all(map(is_packed, found)),
    "causal_offset": lambda found: all(map(is_offset, found)),
    "sliding_window_offset": is_offset_window,
    "ring": is_ring,
}
DROPPED = ("full", "causal", "causal_lower_right")


def is_true(kind: str, found: list[Table]) -> bool:
    return all(table.is_mask for table in found) and CLASSES[kind]([table.attends for table in found])
