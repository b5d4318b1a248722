"""What writes the tokens of an answer one after another: an engine or its graph, with a KV cache or without one."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.config.schema import ShapeConfig
from pipeline.engine.session import Runs, captured
from pipeline.generate.protocol import behind_caller
from pipeline.generate.sampling import Sampling
from pipeline.generate.with_cache import CachedGenerator


class Writer(Protocol):
    """``shortest`` and ``longest_prompt``: tokens that it takes; ``longest``: with those that it writes."""

    shortest: int
    longest_prompt: int
    longest: int

    def steps(self, prompt: list[int], new_tokens: int, sampling: Sampling) -> Generator[int]:
        """Continue ``prompt`` by ``new_tokens``, as they come; whoever has enough closes it."""


def why_none(shape: ShapeConfig, cached: bool, inputs: list[str]) -> str | None:
    """Why an engine of this form can write no answer; None where it can."""
    if shape.batch > 1 and not cached:
        return f"shape.batch={shape.batch}: answers come one at a time where there is no cache; set shape.batch=1"
    told = shape.batch > 1 if cached else "last" in inputs
    if shape.kind == "static" and not told:
        remedy = "shape=dynamic" if cached else "shape=dynamic, or model.inputs=[input_ids,last]"
        return f"an engine that takes {shape.max} tokens and no other number cannot continue a text; set {remedy}"
    return None


class CachedWriter:
    """A :class:`Writer` over a KV cache; every row of a batch writes the same answer."""

    def __init__(self, generator: CachedGenerator, shape: ShapeConfig) -> None:
        self._generator, self._shape = generator, shape
        self.shortest = 1 if shape.kind == "static" else shape.min
        self.longest_prompt, self.longest = shape.max, generator.cache.longest
        if generator.cache.chunk is not None:  # its program takes a prompt of any length
            self.shortest, self.longest_prompt = 1, self.longest - 1

    def steps(self, prompt: list[int], new_tokens: int, sampling: Sampling) -> Generator[int]:
        tokens, padding = torch.tensor([prompt] * self._shape.batch), None
        if self._shape.kind == "static":
            blank = self._shape.max - len(prompt)
            tokens = torch.nn.functional.pad(tokens, (blank, 0))
            padding = (torch.arange(self._shape.max) < blank).expand(tokens.shape)
        with closing(self._generator.steps(tokens, new_tokens, padding, sampling)) as steps:
            for latest in steps:
                yield latest[0]


class PrefixWriter:
    """A :class:`Writer` without a cache: the whole text runs again for each token.

    Either the text grows, and what the program takes with it; or the program is of one length (``shape.kind`` static),
    and is told in ``last`` where the text ends.
    """

    def __init__(
        self,
        session: Runs,
        inputs: list[str],
        shape: ShapeConfig,
        every_position: bool,
        vocabulary: int,
        dtype: torch.dtype,
        device: torch.device,
        output: str = "output0",
        cuda_graph: bool = False,
    ) -> None:
        """``every_position``: the program's logits are those of every position, not of the last alone.  ``cuda_graph``:
        a pass of a program of one length is captured once."""
        self.shortest = 1 if shape.kind == "static" else shape.min
        self.longest_prompt, self.longest = shape.max, shape.max + 1  # the last one is chosen and not read
        self._session, self._shape, self._output = session, shape, output
        self._vocabulary, self._every_position = vocabulary, every_position
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None
        whole = torch.zeros(1, self.longest, dtype=torch.int64, device=device)
        held = {
            "input_ids": whole,
            "attention_mask": torch.ones_like(whole),
            "position_ids": torch.arange(self.longest, device=device).unsqueeze(0),
        }
        self._tokens, self._held = whole, {name: held[name] for name in inputs if name in held}
        self._last = whole.new_zeros(1) if "last" in inputs else None
        self._bound = 0  # tokens
        self._graph: torch.cuda.CUDAGraph | None = None
        self._use_graph = cuda_graph and device.type == "cuda" and shape.kind == "static"
        positions = shape.max if every_position else 1
        self._logits = torch.empty(positions * vocabulary, dtype=dtype, device=device)

    def steps(self, prompt: list[int], new_tokens: int, sampling: Sampling) -> Generator[int]:
        device, begin = self._tokens.device, len(prompt)
        draws = sampling.draws(new_tokens, 1, device)
        self._tokens[0, :begin] = torch.tensor(prompt, device=device)
        for at in range(begin, begin + new_tokens):
            with behind_caller(self._stream):
                chosen = sampling.choose(self._behind(at), draws[at - begin])
                self._tokens[:, at : at + 1] = chosen
                token = int(chosen)  # waits for it
            yield token

    def _behind(self, length: int) -> Tensor:
        """The logits [1, vocabulary] behind the first ``length`` tokens."""
        taken = self._shape.max if self._shape.kind == "static" else length
        positions = taken if self._every_position else 1
        logits = self._logits[: positions * self._vocabulary].view(1, positions, self._vocabulary)
        if self._last is not None:
            self._last.fill_(length - 1)
        if taken != self._bound:
            self._bound = 0
            bound: dict[str, Any] = {name: tensor[:, :taken] for name, tensor in self._held.items()}
            self._session.bind(bound | ({} if self._last is None else {"last": self._last}) | {self._output: logits})
            self._bound = taken
        if self._graph is None:
            self._session.run(self._stream)  # the first pass compiles kernels
            if self._use_graph:
                self._graph = captured(self._stream, lambda: self._session.run(self._stream))
        else:
            self._graph.replay()
        return logits[:, -1]
