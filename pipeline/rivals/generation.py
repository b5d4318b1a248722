"""Generation by Hugging Face's model itself, eager or through ``torch.compile``, each cache at its best.

Greedy, no early stop, and nothing of ours waits for the device between tokens: the chosen token is written on the
device to where the next step reads it.  Two waits are Hugging Face's own, one a pass at most and before anything is
launched for it: without a cache it looks for packed documents in the positions, and an eager prefill into a static
cache looks whether the cache is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from passes.errors import UserError
from passes.private import of_torch
from pipeline.config.schema import BackendConfig, CacheConfig
from pipeline.generate.protocol import behind_caller
from pipeline.model.positions import positions_of
from pipeline.rivals.kernels import Kernels, kernels_of
from pipeline.rivals.prompt import torch_compile_errors
from pipeline.trace.call_form import make_inputs

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from pipeline.generate.protocol import Generator

CAPACITY_MULTIPLE = 64
"""A static cache, or the one length without one, is rounded up to it: torch's memory-efficient attention reads masks in
aligned rows only."""

GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes of ``torch.compile`` that replay CUDA graphs."""


class Compile(Protocol):
    def __call__(self, function: Callable[[], None]) -> Callable[[], None]: ...


def rival_generator(model: PreTrainedModel, backend: BackendConfig, cache: CacheConfig) -> Generator:
    """The generator of ``backend`` (eager, torch_compile) with ``cache`` (none, dynamic, static), on the model's
    device."""
    kind, capacity, kernels = cache.name, cache.capacity, kernels_of(backend, model)
    if backend.name == "eager":
        return EagerGenerator(model, kind, capacity, kernels)
    assert backend.mode is not None
    compiled = partial(torch.compile, mode=backend.mode, dynamic=False)
    return CompiledGenerator(model, kind, capacity, kernels, compiled, graphs=backend.mode in GRAPH_MODES)


class _TorchGenerator:
    """What both have in common: the tokens, their positions and their padding, in buffers for the longest sequence.

    ``_sequence`` [batch, capacity] holds the prompts and then what is chosen; ``_real`` is the attention mask, all ones
    after the prompt, and ``_positions`` goes with it.
    """

    _first_runs = 1
    """Generations after which nothing is compiled or captured any more."""

    def __init__(self, model: PreTrainedModel, cache: str, capacity: int | None, kernels: Kernels) -> None:
        self.model = model
        self.generation = 0
        self.stream: Any = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        self._kind, self._capacity_asked, self._kernels = cache, capacity, kernels
        self._shape: tuple[int, ...] = ()
        self._cache: Cache | None = None
        self._chosen = 0

    def prepare(self, tokens: Tensor, new_tokens: int, padding: Tensor | None = None) -> None:
        """See :class:`pipeline.generate.protocol.Generator`; for a shape that is bound already only the tokens are
        replaced.

        Raises :class:`UserError` where they do not fit into ``cache.capacity``, :class:`RunError` of kind
        ``torch_compile`` where that fails.
        """
        shape = (*tokens.shape, new_tokens, int(padding is not None))
        bound = shape == self._shape
        if not bound:
            self.generation += 1
            self._allocate(len(tokens), tokens.shape[1], new_tokens, padding is not None)
            self._shape = shape
        length, device = tokens.shape[1], self.model.device
        tokens = tokens.to(device)
        padding = None if padding is None else padding.to(device)
        placed = make_inputs(["attention_mask", "position_ids"], tokens, padding)
        self._sequence[:, :length] = tokens
        self._real[:, :length] = placed["attention_mask"]
        self._positions.copy_(make_inputs(["position_ids"], self._real, self._real == 0)["position_ids"])
        with behind_caller(self.stream), torch_compile_errors():
            for _ in range(1 if bound else self._first_runs):
                self.prefill()
                for _ in range(new_tokens - 1):
                    self.decode()
        if self.stream is not None:
            self.stream.synchronize()

    @property
    def cuda_graph(self) -> bool:
        return False

    def _allocate(self, batch: int, length: int, new_tokens: int, padded: bool) -> None:
        total = length + new_tokens
        self._capacity = self._capacity_asked or -(-total // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        positions = positions_of(self.model.config)
        if self._kind == "none" and positions is not None:
            self._capacity = max(min(self._capacity, positions), total)
        if self._capacity < total:
            raise UserError(
                f"cache.capacity={self._capacity}: {length} tokens of the prompt and {new_tokens} new ones are "
                f"{total}; set at least that"
            )
        self._length, self._padded = length, padded
        zeros = partial(torch.zeros, dtype=torch.int64, device=self.model.device)
        self._sequence = zeros(batch, self._capacity)
        self._real = zeros(batch, self._capacity) + 1
        self._positions = zeros(batch, self._capacity)
        self._cache = None
        if self._kind == "static":
            self._cache = self._static_cache(batch)

    def _static_cache(self, batch: int) -> Cache:
        """Allocated in advance: a cache that is allocated inside a compiled pass has no address of its own."""
        from transformers import StaticCache

        cache = StaticCache(config=self.model.config, max_cache_len=self._capacity)
        with torch.no_grad(), behind_caller(self.stream):
            self.model(input_ids=self._sequence[:, :1], cache=cache, use_cache=True, logits_to_keep=1)
        return cache

    def prefill(self) -> None:
        raise NotImplementedError

    def decode(self) -> None:
        raise NotImplementedError

    def tokens(self) -> Tensor:
        """[batch, chosen so far] int64."""
        if self.stream is not None:
            self.stream.synchronize()
        return self._sequence[:, self._length : self._length + self._chosen].clone()

    def _rewind(self) -> None:
        """The static cache holds nothing again.  Its stale keys are masked, so the counts suffice."""
        from transformers.cache_utils import StaticLayer

        assert self._cache is not None
        if all(type(layer) is StaticLayer for layer in self._cache.layers):
            of_torch.set_to_zero([layer.cumulative_length for layer in self._cache.layers])
        else:  # a window keeps its tokens in other ways
            self._cache.reset()

    def _keeping(self) -> dict[str, Any]:
        return {"cache": self._cache, "use_cache": self._cache is not None}


class EagerGenerator(_TorchGenerator):
    """Op by op.  Without a cache every token runs the whole prefix again, which grows: the report's PyTorch row."""

    def prefill(self) -> None:
        from transformers import DynamicCache

        with torch.no_grad():
            if self._kind == "dynamic":
                self._cache = None  # its memory is the next one's
                self._cache = DynamicCache(config=self.model.config)
            elif self._kind == "static":
                self._rewind()
            self._chosen = 0
            self._choose(0)

    def decode(self) -> None:
        with torch.no_grad():
            self._choose(0 if self._kind == "none" else self._length + self._chosen - 1)

    def _choose(self, first: int) -> None:
        """Run the positions from ``first`` on and append the token that follows them."""
        end = self._length + self._chosen
        placing = {}
        if self._padded:
            seen = self._capacity if self._kind == "static" else end
            placing = {"attention_mask": self._real[:, :seen], "position_ids": self._positions[:, first:end]}
        with self._kernels():
            logits = self.model(
                input_ids=self._sequence[:, first:end], logits_to_keep=1, **self._keeping(), **placing
            ).logits
        self._sequence[:, end : end + 1] = logits.argmax(-1)
        self._chosen += 1


class CompiledGenerator(_TorchGenerator):
    """Prefill and step compiled at exactly their shapes, the choice and the feeding back of the token with them.

    Without a cache there is one pass, over a whole sequence that is long enough: it is causal, so what stands after
    the last token changes nothing, and one shape needs one compilation and can be a CUDA graph.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: str,
        capacity: int | None,
        kernels: Kernels,
        compile: Compile,
        graphs: bool,
    ) -> None:
        super().__init__(model, cache, capacity, kernels)
        self._compile, self._graphs = compile, graphs and model.device.type == "cuda"
        self._first_runs = 3 if self._graphs else 1  # warm up, capture, replay

    @property
    def cuda_graph(self) -> bool:
        """Whether passes are replayed: torch was asked to, and skipped none."""
        return self._graphs and self._skipped() == self._skipped_before

    @staticmethod
    def _skipped() -> int:
        return of_torch.skipped_cuda_graphs()

    def _allocate(self, batch: int, length: int, new_tokens: int, padded: bool) -> None:
        super()._allocate(batch, length, new_tokens, padded)
        self._skipped_before = self._skipped()
        self._last = torch.zeros(1, dtype=torch.int64, device=self.model.device)  # position of the last known token
        model, last, keeping = self.model, self._last, self._keeping()
        sequence, real, positions = self._sequence, self._real, self._positions
        for tensor in (sequence, real, positions, last):
            of_torch.stays_in_place(tensor)  # else a CUDA graph would copy it in, and could not write to it

        def placing(mask: Tensor, where: Tensor) -> dict[str, Tensor]:
            return {"attention_mask": mask, "position_ids": where} if padded else {}

        def put(logits: Tensor) -> None:
            last.add_(1)
            sequence.index_copy_(1, last, logits.argmax(-1))

        def whole() -> None:
            where = placing(real, positions)
            put(model(input_ids=sequence, logits_to_keep=last, use_cache=False, **where).logits)

        def prompt() -> None:
            where = placing(real, positions[:, :length])
            put(model(input_ids=sequence[:, :length], logits_to_keep=1, **keeping, **where).logits)

        def step() -> None:
            where = placing(real, positions.index_select(1, last))
            put(model(input_ids=sequence.index_select(1, last), logits_to_keep=1, **keeping, **where).logits)

        if self._kind == "none":
            self._prompt = self._step = self._compile(whole)
        else:
            self._prompt, self._step = self._compile(prompt), self._compile(step)

    def prefill(self) -> None:
        with torch.no_grad(), self._kernels():
            if self._kind == "static":
                self._rewind()
            self._last.fill_(self._length - 1)
            torch.compiler.cudagraph_mark_step_begin()
            self._prompt()
        self._chosen = 1

    def decode(self) -> None:
        with torch.no_grad(), self._kernels():
            torch.compiler.cudagraph_mark_step_begin()
            self._step()
        self._chosen += 1
