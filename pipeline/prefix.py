"""Generates without a cache: an engine runs the whole prefix again for each token, as the report's rows do."""

from __future__ import annotations

import torch
from torch import Tensor

from passes.errors import UserError
from pipeline.session import Session


class PrefixGenerator:
    """A :class:`pipeline.generate.Generator` without a cache: the engine runs the whole prefix again for each token.

    The prefix grows in one buffer, so for a batch of one nothing is copied; only the engine's input grows.
    """

    cuda_graph = False  # the length is another at each step

    def __init__(self, session: Session, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        self.generation = 0
        self.stream = torch.cuda.Stream()
        self._session, self._vocabulary, self._dtype, self._device = session, vocabulary, dtype, device

    def prepare(self, tokens: Tensor, new_tokens: int, padding: Tensor | None = None) -> None:
        """See :meth:`pipeline.generate.Generator.prepare`."""
        if padding is not None or len(tokens) != 1:
            raise UserError("cache=none: generates one prompt at a time; use cache=static or in_engine for a batch")
        self.generation += 1
        self._length = tokens.shape[1]
        self._buffer = torch.zeros(1, self._length + new_tokens, dtype=torch.int64, device=self._device)
        self._buffer[:, : self._length] = tokens
        self._logits = torch.empty(1, 1, self._vocabulary, dtype=self._dtype, device=self._device)
        (output,) = self._session.outputs
        self._session.bind({"input_ids": self._buffer[:, : self._length], output: self._logits})
        self._at = self._length
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            self.prefill()
            for _ in range(new_tokens - 1):
                self.decode()
        self.stream.synchronize()

    def prefill(self) -> None:
        self._at = self._length
        self.decode()

    def decode(self) -> None:
        self._session.fit({"input_ids": (1, self._at)})
        self._session.run(self.stream)
        torch.argmax(self._logits[:, 0], -1, out=self._buffer[:, self._at])
        self._at += 1

    def tokens(self) -> Tensor:
        self.stream.synchronize()
        return self._buffer[:, self._length : self._at].clone()
