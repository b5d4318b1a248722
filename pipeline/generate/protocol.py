"""What generates, as the benchmark and the verification see it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Generator(Protocol):
    """Generates step by step on the device, greedily, for a batch of prompts of one length and without early stop.

    One generation is :meth:`prefill` and then :meth:`decode` for each token after the first.
    """

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """None where there is no GPU; then nothing can be timed."""

    @property
    def cuda_graph(self) -> bool:
        """Whether a decode step really is the replay of a CUDA graph."""

    @property
    def generation(self) -> int:
        """Goes up whenever anything is bound, built or captured.  It may not move while a generation is timed."""

    def prepare(self, tokens: Tensor, new_tokens: int, padding: Tensor | None = None) -> None:
        """Allocate everything for prompts ``tokens`` [batch, length] int64 and ``new_tokens`` more, compile and
        capture; ``padding`` [batch, length] bool is True at padding.  One whole generation has then run."""

    def prefill(self) -> None:
        """Launch the pass over the prompts and the choice of the first token on the current stream; no waiting."""

    def decode(self) -> None:
        """Launch the step that chooses the next token, fed with the last one on the device; no waiting."""

    def tokens(self) -> Tensor:
        """[batch, chosen so far] int64: what the last generation chose; waits for it."""


@contextmanager
def behind_caller(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What is launched inside runs on ``stream``, behind all that the caller has launched (the copy of a prompt):
    one stream of torch does not wait for another.  Without a GPU ``stream`` is None, and nothing is done."""
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield
