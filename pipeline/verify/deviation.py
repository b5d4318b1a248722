"""How far logits are from others: over all positions, at each of them, and in each block of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from passes.errors import RunError
from pipeline.verify.sections import Deviation

CHUNK = 32  # positions compared at a time, few enough to stay in the cache: three times as fast as 256
BLOCK = 128
"""Tokens of the vocabulary in a block: the columns of one tile of a matrix product, which a kernel gets right or
wrong as a whole."""


@dataclass(frozen=True)
class Difference:
    """``x`` against the reference, both logits [batch, 1 or length, V], at the n positions that are real.

    All tensors are on the CPU, numbers in float64.
    """

    positions: Tensor
    """[n, 2] int64: row of the batch and place among the reference's positions."""
    truth_square: Tensor
    """[n]: sum of the squares of the reference's logits."""
    truth_max: Tensor
    """[n]: the largest of their magnitudes."""
    square: Tensor
    """[n]: sum of the squares of x."""
    dot: Tensor
    """[n]: sum of x times the reference."""
    error_square: Tensor
    """[n]: sum of the squares of x - reference."""
    max_abs: Tensor
    """[n]: the largest magnitude of x - reference."""
    kl: Tensor
    """[n]: KL(reference || x) in nats."""
    lead: Tensor
    """[n]: of the reference's most likely token over its second, where x has another as the most likely; else 0."""
    block_truth: Tensor
    """[blocks]: ``truth_square`` of each :data:`BLOCK` of the vocabulary, over all positions."""
    block_error: Tensor
    """[blocks]: ``error_square`` likewise."""

    @cached_property
    def relative_error(self) -> Tensor:
        """[n]: ||x - reference|| / ||reference|| at each position."""
        return _ratio(self.error_square, self.truth_square)

    @cached_property
    def relative_error_of_blocks(self) -> Tensor:
        """[blocks]: the same in each block of the vocabulary, over all positions."""
        return _ratio(self.block_error, self.block_truth)

    def deviation(self, explained: Tensor) -> Deviation:
        """``explained`` [n]: the lead that rounding can turn at each position."""
        truth, square = float(self.truth_square.sum()), float(self.square.sum())
        return Deviation(
            relative_error=float(_ratio(self.error_square.sum(), self.truth_square.sum())),
            max_abs=float(self.max_abs.max()),
            cosine=float(self.dot.sum()) / (truth * square) ** 0.5 if truth and square else 0.0,
            kl=float(self.kl.mean()),
            top1_agreement=1 - int((self.lead > 0).sum()) / len(self.lead),
            unexplained_flips=int((self.lead > explained).sum()),
        )


def _ratio(error_square: Tensor, truth_square: Tensor) -> Tensor:
    """The root of the quotient; no error is none of nothing either."""
    return (error_square / truth_square).where(error_square != 0, 0.0).sqrt()


def difference(truth: Tensor, logits: Tensor, padding: Tensor | None) -> Difference:
    """``logits`` against ``truth``, both [batch, 1 or length, V], in the type of ``truth``.

    ``padding`` [batch, length] is True at positions that are not compared.  Raises :class:`RunError` of kind
    ``accuracy`` for logits of another shape and where no position is left.
    """
    if logits.shape != truth.shape:
        raise RunError("accuracy", f"logits of shape {tuple(logits.shape)}, not {tuple(truth.shape)}")
    positions = _real_positions(truth, padding)
    if not len(positions):
        raise RunError("accuracy", "a case without a single real position: nothing was compared")
    by_position: list[Tensor] = []
    by_block: Tensor | None = None
    for chunk in positions.split(CHUNK):
        where = (chunk[:, 0], chunk[:, 1])
        wanted, got = truth[where], logits[where].to(truth)
        delta, log_p = got - wanted, wanted.log_softmax(-1)
        squares, errors = _squares_of_blocks(wanted), _squares_of_blocks(delta)
        best = wanted.topk(2, dim=-1).values
        flipped = got.argmax(-1) != wanted.argmax(-1)
        numbers = (
            squares.sum(-1),
            wanted.abs().amax(-1),
            torch.linalg.vecdot(got, got),
            torch.linalg.vecdot(got, wanted),
            errors.sum(-1),
            delta.abs().amax(-1),
            torch.linalg.vecdot(log_p.exp(), log_p - got.log_softmax(-1)).clamp(min=0),  # rounding may go below
            (best[:, 0] - best[:, 1]).where(flipped, 0.0),
        )
        by_position.append(torch.stack([number.double() for number in numbers]))
        blocks = torch.stack([squares.sum(0, dtype=torch.float64), errors.sum(0, dtype=torch.float64)])
        by_block = blocks if by_block is None else by_block + blocks
    assert by_block is not None
    return Difference(positions.cpu(), *torch.cat(by_position, dim=1).cpu(), *by_block.cpu())


def _real_positions(truth: Tensor, padding: Tensor | None) -> Tensor:
    """[n, 2]: the (row, position) pairs of ``truth`` [batch, 1 or length, V] that are not padding."""
    keep = torch.ones(truth.shape[:2], dtype=torch.bool, device=truth.device)
    if padding is not None:  # with the last position only, rows that end in padding say nothing
        keep = ~padding[:, -truth.shape[1] :].to(truth.device)
    return keep.nonzero()


def _squares_of_blocks(x: Tensor) -> Tensor:
    """[rows, blocks]: of ``x`` [rows, V], the sum of the squares in each :data:`BLOCK`; the last may be shorter."""
    squares = pad(x.square(), (0, -x.shape[1] % BLOCK))
    return squares.view(len(x), -1, BLOCK).sum(-1)
