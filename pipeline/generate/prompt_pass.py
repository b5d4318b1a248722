"""The pass over the prompts of a generator with a KV cache: all their tokens at once, or a chunk after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.engine.session import Runs
from pipeline.trace.cache_shape import CacheShape


class PromptPass(Protocol):
    """Fills the cache with the prompts, and gives the logits behind each."""

    def bind(self, batch: int, length: int, logits: Tensor) -> None:
        """Allocate everything for prompts [batch, length], whose logits go to ``logits`` [batch, 1, vocabulary]."""

    def hold(self, rows: Tensor, lengths: Tensor) -> None:
        """Take the prompts ``rows`` [batch, length], of which the first ``lengths`` [batch] tokens are real."""

    def run(self, stream: torch.cuda.Stream | None) -> int:
        """Launch it, which waits for nothing and allocates nothing; which of the cache's turns it filled."""

    @property
    def rest(self) -> Tensor:
        """[batch, tokens] of the prompts that it leaves to the steps."""


class WholePrompts:
    """A program that runs all tokens in one pass, whatever their number within its profile."""

    def __init__(self, program: Runs, cache: CacheShape, caches: Sequence[Tensor]) -> None:
        self._program, self._cache, self._caches = program, cache, caches

    def bind(self, batch: int, length: int, logits: Tensor) -> None:
        self._rows = torch.zeros(batch, length, dtype=torch.int64, device=logits.device)
        self._last = torch.zeros(batch, dtype=torch.int64, device=logits.device)
        self._made = self._caches  # filled where they lie, or of the prompts' length and copied there
        if self._cache.mode != "in_engine":
            self._made = [part.clone() for part in self._cache.filled(self._caches, length)]
        tensors = {"input_ids": self._rows, "last": self._last, "output0": logits}
        self._program.bind(tensors | self._cache.named(self._caches) | outputs(self._made))

    def hold(self, rows: Tensor, lengths: Tensor) -> None:
        self._rows.copy_(rows)
        self._last.copy_(lengths - 1)

    def run(self, stream: torch.cuda.Stream | None) -> int:
        self._program.run(stream)
        if self._made is not self._caches:
            for part, made in zip(self._cache.filled(self._caches, self._rows.shape[1]), self._made, strict=True):
                part.copy_(made)
        return 0

    @property
    def rest(self) -> Tensor:
        return self._rows[:, :0]


class ChunkedPrompts:
    """A program that runs ``cache.chunk`` tokens of each row over the cache (:mod:`pipeline.trace.chunk_form`).

    The last chunk is filled up behind the prompts, so that the sizes that the program meets are multiples of the chunk,
    the same for prompts of any length.  What is written there into the cache is not seen, and the tokens that are
    generated take its place; a ring is told how many of a chunk's tokens are real.  Into states everything is written,
    so there the tokens that fill no chunk are left over.
    """

    def __init__(self, program: Runs, cache: CacheShape, turns: Sequence[Sequence[Tensor]], chunk: int) -> None:
        self._program, self._cache, self._turns, self._chunk = program, cache, turns, chunk

    def bind(self, batch: int, length: int, logits: Tensor) -> None:
        full, over = divmod(length, self._chunk)
        count, device = full if self._cache.states else full + bool(over), logits.device
        self.rest = torch.zeros(batch, max(length - count * self._chunk, 0), dtype=torch.int64, device=device)
        self._tokens = torch.zeros(count, batch, self._chunk, dtype=torch.int64, device=device)
        self._last, self._real = (torch.zeros(count, batch, dtype=torch.int64, device=device) for _ in range(2))
        self._ends = torch.zeros(count, batch, 1, 1, dtype=torch.bool, device=device)
        # Padding has no position of its own: a model has embeddings up to its longest sequence and no further.
        places = torch.arange(count * self._chunk, device=device).clamp(max=self._cache.longest - 1)
        self._places = places.unsqueeze(0)
        self._logits, self._behind_chunk = logits, torch.full_like(logits, float("nan"))
        if count:
            self._bind_chunk(count - 1)  # a length that does not fit is refused here

    def hold(self, rows: Tensor, lengths: Tensor) -> None:
        count, batch, chunk = self._tokens.shape
        whole = pad(rows, (0, count * chunk - rows.shape[1]))  # cut, where that is less than 0
        self.rest.copy_(rows[:, count * chunk :])
        self._tokens.copy_(whole.view(batch, count, chunk).transpose(0, 1))
        last, number = lengths - 1, torch.arange(count, device=lengths.device).unsqueeze(1)
        self._last.copy_((last - number * chunk).clamp(0, chunk - 1))
        self._real.copy_((lengths - number * chunk).clamp(0, chunk))
        self._ends.copy_((last // chunk == number)[:, :, None, None])

    def run(self, stream: torch.cuda.Stream | None) -> int:
        for state in self._cache.states_in(self._turns[0]):
            state.zero_()
        for number, ends in enumerate(self._ends):
            self._bind_chunk(number)
            self._program.run(stream)
            torch.where(ends, self._behind_chunk, self._logits, out=self._logits)
        return len(self._ends) % len(self._turns)

    def _bind_chunk(self, number: int) -> None:
        seen = self._places[:, : (number + 1) * self._chunk]
        before, after = (self._turns[i % len(self._turns)] for i in (number, number + 1))
        own = {"input_ids": self._tokens[number], "last": self._last[number], "places": seen}
        own |= {"output0": self._behind_chunk} | self._cache.named(before) | outputs(after)
        if self._cache.near is not None:
            own |= {"real": self._real[number], "near": seen[:, -self._cache.near :]}
        self._program.bind(own)


def prompt_pass(program: Runs, cache: CacheShape, turns: Sequence[Sequence[Tensor]]) -> PromptPass:
    """What runs ``program`` over prompts; it fills ``turns``, the tensors of ``cache`` (:meth:`CacheShape.turns`)."""
    if cache.chunk is None:
        return WholePrompts(program, cache, turns[0])
    return ChunkedPrompts(program, cache, turns, cache.chunk)


def outputs(caches: Sequence[Tensor]) -> dict[str, Tensor]:
    """``caches`` by the names of the outputs behind the logits."""
    return {f"output{i + 1}": cache for i, cache in enumerate(caches)}
