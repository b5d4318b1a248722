"""What an engine is compared on: lengths over every profile, padded rows, ragged rows, and rows of two documents."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from pipeline.config.schema import ShapeConfig
from pipeline.config.verification import VerifyConfig
from pipeline.engine import guard
from pipeline.trace.call_form import make_inputs
from pipeline.verify.sections import Case

DECODED = 4
"""Tokens of a case that run through a KV cache one by one, where its length leaves that many behind a prompt."""
ROWS = slice(0, None, 2)
"""Which rows of a batch are padded or packed: every second one, and the only one."""


def cases(
    config: VerifyConfig,
    shape: ShapeConfig,
    inputs: list[str],
    logits: str,
    capacity: int = 0,
    exact: Sequence[int] = (),
    ragged: bool = False,
    kernels: bool = True,
    chunk: int | None = None,
) -> list[Case]:
    """The lengths of :func:`lengths`, with padding and packed documents where ``attention_mask`` and ``position_ids``
    are among the ``inputs`` to say so, and ``ragged`` where a generator is told how long each row of a batch is.
    ``kernels``: whether what is compared has kernels of its own for some lengths, as an engine has.

    Of a row that is padded on the right the last position says nothing, so ``logits=last`` has no such case.
    """
    kinds = [("none", "counted")] + [("ragged", "counted")] * ragged
    if "attention_mask" in inputs:
        kinds += [("left", "counted")] + [("right", "counted")] * (logits == "all")
    if "position_ids" in inputs:
        kinds.append(("none", "packed"))
    found = []
    for length in sorted(set(config.lengths or lengths(shape, capacity, exact, kernels, chunk))):
        for padding, positions in kinds if length > 2 else kinds[:1]:
            suffix = {"none": "", "ragged": "_ragged"}.get(padding, f"_{padding}_padding")
            suffix += "" if positions == "counted" else f"_{positions}"
            for sample in range(config.samples):
                name = f"length_{length}{suffix}" + (f"_{sample}" if sample else "")
                found.append(Case(name, length, padding, sample, positions))
    return found


def lengths(
    shape: ShapeConfig, capacity: int, exact: Sequence[int], kernels: bool, chunk: int | None = None
) -> list[int]:
    """Both ends of the profile, odd lengths, and where there are ``kernels`` around 512: TensorRT changes them there.

    ``exact``: lengths with an optimization profile of their own; each is tried, and the ends are the shortest and the
    longest of those beside them, which are left to the other profile.  ``capacity``: of a KV cache, or 0 without one;
    the first length that only the cache reaches, and its last; and one token behind each prompt of exact length, whose
    cache it reads.  ``chunk``: tokens of a prompt that run at once; prompts that end on both sides of the end of the
    first chunk and of the second.
    """
    beside = [n for n in range(shape.min, shape.max + 1) if n not in exact]
    odd = (7, 77, 511, 512, 513) if kernels else (7, 77)
    found = [*beside[:1], *beside[-1:], *exact, *(n for n in odd if shape.min <= n <= shape.max)]
    if capacity:
        found += [n for n in (*(n + 1 for n in exact), shape.max + 1, capacity) if n <= capacity]
    if chunk:
        ends = (chunk - 1, chunk, chunk + 1, 2 * chunk, 2 * chunk + 1)
        found += [n + DECODED for n in ends if shape.min <= n <= shape.max and n + DECODED <= capacity]
    return found


def case_inputs(case: Case, names: list[str], tokens: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inputs ``names`` of ``case`` for ``tokens`` [batch, length], and its :func:`padding_mask`; for ragged rows
    those that say where each begins as well."""
    padding = padding_mask(case, len(tokens))
    if case.padding == "ragged":
        names = list(dict.fromkeys((*names, "attention_mask", "position_ids")))
    inputs = make_inputs(names, tokens, None if padding is None else padding.to(tokens.device))
    if case.positions == "packed":
        restart = case.length // 2
        inputs["position_ids"][ROWS, restart:] -= restart
    return inputs, padding


def padding_mask(case: Case, batch: int) -> Tensor | None:
    """[batch, length] bool, True at padding; None without padding."""
    if case.padding == "none":
        return None
    if case.padding == "ragged":
        return ragged_padding(batch, case.length)
    mask = torch.zeros(batch, case.length, dtype=torch.bool)
    pad = case.length // 3
    if case.padding == "left":
        mask[ROWS, :pad] = True
    else:
        mask[ROWS, case.length - pad :] = True
    return mask


def ragged_padding(batch: int, length: int) -> Tensor:
    """[batch, length] bool, True at padding, on the left: rows of ``length`` tokens down to a third of it."""
    pads = torch.arange(batch) * (2 * length // 3) // max(batch - 1, 1)
    return torch.arange(length) < pads.unsqueeze(1)


def split(
    every: list[Case], conditions: Collection[str], names: list[str], batch: int
) -> tuple[list[Case], list[Case]]:
    """The cases whose inputs keep the ``conditions`` (see :mod:`pipeline.engine.guard`), and those whose inputs do
    not."""
    inside: list[Case] = []
    outside: list[Case] = []
    for case in every:
        inputs, _ = case_inputs(case, names, torch.zeros(batch, case.length, dtype=torch.int64))
        (outside if guard.violation(conditions, inputs) else inside).append(case)
    return inside, outside
