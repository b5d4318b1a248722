"""Generates without a cache: an engine runs the whole prefix again for each token, as the report's rows do.

Either the prefix grows, and the engine's length with it; or it lies at the front of one length, and the engine is told
where it ends.  What stands behind that place is not read: every mask of a decoder hides later tokens from earlier ones,
which is what the strategies prove, and which the verification checks over many such places.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from passes.errors import UserError
from pipeline.engine.session import Runs, Session, captured
from pipeline.generate.protocol import behind_caller


def _check_one_prompt(tokens: Tensor, padding: Tensor | None) -> None:
    if padding is not None or len(tokens) != 1:
        raise UserError("cache=none: generates one prompt at a time; use cache=static or in_engine for a batch")


class PrefixGenerator:
    """A :class:`pipeline.generate.protocol.Generator` without a cache: the engine runs the whole prefix again for each
    token.

    The prefix grows in one buffer, so for a batch of one nothing is copied; only the engine's input grows.
    """

    cuda_graph = False  # the length is another at each step

    def __init__(self, session: Session, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        self.generation = 0
        self.stream = torch.cuda.Stream()
        self._session, self._vocabulary, self._dtype, self._device = session, vocabulary, dtype, device

    def prepare(self, tokens: Tensor, new_tokens: int, padding: Tensor | None = None) -> None:
        """See :meth:`pipeline.generate.protocol.Generator.prepare`."""
        _check_one_prompt(tokens, padding)
        self.generation += 1
        self._length = tokens.shape[1]
        self._buffer = torch.zeros(1, self._length + new_tokens, dtype=torch.int64, device=self._device)
        self._buffer[:, : self._length] = tokens
        self._logits = torch.empty(1, 1, self._vocabulary, dtype=self._dtype, device=self._device)
        (output,) = self._session.outputs
        self._session.bind({"input_ids": self._buffer[:, : self._length], output: self._logits})
        self._at = self._length
        with behind_caller(self.stream):
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


class OneLengthGenerator:
    """A :class:`pipeline.generate.protocol.Generator` without a cache: a program of ``length`` tokens with an input
    ``last``, the place of the token whose logits are asked for.

    No shape ever changes, so a step is one CUDA graph: the pass, the choice, and where the next pass looks.
    """

    def __init__(
        self,
        session: Runs,
        length: int,
        vocabulary: int,
        dtype: torch.dtype,
        device: torch.device,
        cuda_graph: bool = True,
    ) -> None:
        self.generation = 0
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self._session, self._whole, self._use_graph = session, length, cuda_graph
        self._sequence = torch.zeros(1, length + 1, dtype=torch.int64, device=device)  # and the token behind the end
        self._last = torch.zeros(1, dtype=torch.int64, device=device)
        self._logits = torch.full((1, 1, vocabulary), float("nan"), dtype=dtype, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def cuda_graph(self) -> bool:
        return self._graph is not None

    def prepare(self, tokens: Tensor, new_tokens: int, padding: Tensor | None = None) -> None:
        """See :meth:`pipeline.generate.protocol.Generator.prepare`."""
        _check_one_prompt(tokens, padding)
        length = tokens.shape[1]
        if length + new_tokens - 1 > self._whole:
            raise UserError(f"{length} tokens and {new_tokens} more: above shape.max={self._whole} of the engine")
        self._length = length
        with behind_caller(self.stream):
            if not self.generation:
                self._bind()
            self._sequence[:, :length] = tokens
            self.prefill()
            for _ in range(new_tokens - 1):
                self.decode()
        self._wait()

    def _bind(self) -> None:
        self.generation += 1
        held = {"input_ids": self._sequence[:, : self._whole], "last": self._last, "output0": self._logits}
        self._session.bind(held)
        self._step()  # the first pass compiles kernels
        if self._use_graph and self.stream is not None:  # TensorRT-RTX 1.4 says that it cannot be, of what can
            self._graph = captured(self.stream, self._step)

    def prefill(self) -> None:
        self._last.fill_(self._length - 1)
        self._chosen = 0
        self.decode()

    def decode(self) -> None:
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
        self._chosen += 1

    def _step(self) -> None:
        self._session.run(self.stream)
        self._last.add_(1)
        self._sequence.index_copy_(1, self._last, self._logits[:, 0].argmax(-1, keepdim=True))

    def tokens(self) -> Tensor:
        self._wait()
        return self._sequence[:, self._length : self._length + self._chosen].clone()

    def _wait(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


def at_one_length(forward: Callable[[dict[str, Tensor]], Tensor], length: int) -> Callable[[dict[str, Tensor]], Tensor]:
    """``forward`` for shorter sequences: ``input_ids`` [batch, up to ``length``] get zeros behind them."""

    def run(inputs: dict[str, Tensor]) -> Tensor:
        tokens = inputs["input_ids"]
        return forward(inputs | {"input_ids": pad(tokens, (0, length - tokens.shape[1]))})

    return run
