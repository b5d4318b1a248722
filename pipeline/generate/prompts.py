"""The prompts of a generator with a cache, as something whose passes can be timed by themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.generate.with_cache import CachedGenerator


class PromptRunner:
    """The prompts' program of a :class:`CachedGenerator` as a :class:`pipeline.measure.prompt.Runner`.

    ``alone``: nothing is generated beside, and the generator gives up what that takes when prompts are prepared."""

    cuda_graph = False

    def __init__(self, generator: CachedGenerator, alone: bool) -> None:
        self._generator, self._alone = generator, alone

    @property
    def stream(self) -> torch.cuda.Stream:
        assert self._generator.stream is not None
        return self._generator.stream

    @property
    def generation(self) -> int:
        return self._generator.generation

    def prepare(self, tokens: Tensor) -> None:
        if self._alone:
            self._generator.prompts_only()
        self._generator.bind_prompts(tokens)

    def enqueue(self) -> None:
        self._generator.run_prompts()
