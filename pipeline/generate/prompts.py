"""The prompts of a generator with a cache, as something whose passes can be timed by themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.generate.with_cache import CachedGenerator


class PromptRunner:
    """The prompts' program of a :class:`CachedGenerator` as a :class:`pipeline.measure.prompt.Runner`."""

    cuda_graph = False

    def __init__(self, generator: CachedGenerator) -> None:
        self._generator = generator

    @property
    def stream(self) -> torch.cuda.Stream:
        assert self._generator.stream is not None
        return self._generator.stream

    @property
    def generation(self) -> int:
        return self._generator.generation

    def prepare(self, tokens: Tensor) -> None:
        self._generator.bind_prompts(tokens)

    def enqueue(self) -> None:
        self._generator.run_prompts()
