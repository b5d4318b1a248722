"""Generates with a KV cache of fixed capacity: one program runs the prompts, another each token after them.

Everything stays on the device: the next token is chosen there and fed back, and a decode step is one CUDA graph, choice
of the token included; where the engine cannot be captured, TensorRT-RTX replays a graph of its own and the choice is
launched behind it.  All that a step reads and writes has its place for good, as large as the cache allows: where a row
stands, how tokens are drawn and how many are wanted are numbers on the device, so that a step is captured once and
serves every generation.  Prompts alone are bound anew, when they are of another length.

Rows of a batch begin at place 0 of the cache.  Padding on the left is moved to the right before the prompts run: a
causal mask hides it there, and the row's first new token takes the place of its first padding.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.engine.session import Held, Runs, captured
from pipeline.generate.prompt_pass import outputs, prompt_pass
from pipeline.generate.protocol import behind_caller
from pipeline.generate.rows import aligned
from pipeline.generate.sampling import Choice, Sampling
from pipeline.trace.cache_shape import CacheShape

OnTokens = Callable[[list[int]], object]


class CachedGenerator:
    """A :class:`pipeline.generate.protocol.Generator`.

    ``decode``: as many programs as ``cache`` has :attr:`CacheShape.steps`, which take turns.
    """

    def __init__(
        self,
        prefill: Runs,
        decode: Sequence[Runs],
        cache: CacheShape,
        vocabulary: int,
        device: torch.device,
        cuda_graph: bool = True,
    ) -> None:
        self.cache = cache
        self.generation = 0
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self._prefill, self._decode = prefill, decode
        self._device, self._vocabulary = device, vocabulary
        self._use_graph = cuda_graph and device.type == "cuda"
        self._caches = cache.turns(device)
        self._graphs: dict[bool, list[torch.cuda.CUDAGraph]] = {}  # of a greedy step, and of one that draws
        self._replays_itself = False
        self._prompts = prompt_pass(prefill, cache, self._caches)
        self._bound: tuple[int, ...] = ()
        self._prepared: tuple[Any, ...] | None = None
        batch, zeros = cache.batch, partial(torch.zeros, dtype=torch.int64, device=device)
        self._lengths, self._position = zeros(batch), zeros(batch)
        self._token = zeros(batch, 1)
        self._count = zeros(1)
        self._tokens = zeros(batch, cache.longest)
        self._logits = torch.empty(batch, 1, vocabulary, dtype=cache.dtype, device=device)
        self._choice = Choice(cache.longest, batch, device)
        for turn, session in enumerate(decode):
            after = self._caches[(turn + 1) % len(decode)]
            held = {"input_ids": self._token, "position": self._position, "output0": self._logits}
            session.bind(held | cache.named(self._caches[turn]) | outputs(after))

    @property
    def cuda_graph(self) -> bool:
        return any(self._graphs.values()) or self._replays_itself

    def prepare(
        self, tokens: Tensor, new_tokens: int, padding: Tensor | None = None, sampling: Sampling | None = None
    ) -> None:
        """See :meth:`pipeline.generate.protocol.Generator.prepare`; raises :class:`UserError` for what the cache cannot
        hold."""
        if self._ready(tokens, new_tokens, padding, sampling):
            return
        with behind_caller(self.stream):
            self.prefill()
            for _ in range(new_tokens - 1):
                self.decode()
        self._wait()

    def _ready(self, tokens: Tensor, new_tokens: int, padding: Tensor | None, sampling: Sampling | None) -> bool:
        """Have everything of a generation in place, steps captured; whether it was so before."""
        sampling = sampling or Sampling()
        prompts, lengths = aligned(tokens, padding, cut=not self.cache.padded)
        self.cache.check(prompts.shape, new_tokens)
        asked = (*prompts.shape, new_tokens, sampling)
        was_ready = asked == self._prepared
        if not was_ready:
            self._bind(prompts.shape)
            self._choice.prepare(sampling, new_tokens)
        self._hold(prompts, lengths)
        if self.stream is not None and new_tokens > 1 and self._choice.greedy not in self._graphs:
            self._compile(self.stream)
        self._prepared = asked
        return was_ready

    def _compile(self, stream: torch.cuda.Stream) -> None:
        """The first pass compiles a step's kernels; behind it the steps are captured, where they can be."""
        self.generation += 1
        self._graphs[self._choice.greedy] = []
        self._position.zero_()
        self._count.zero_()
        with behind_caller(stream):
            for turn in range(len(self._decode)):
                self._step(turn)
            if self._use_graph and not self._replays_itself:
                if all(session.capturable(stream) for session in self._decode):
                    graphs = [captured(stream, partial(self._step, turn)) for turn in range(len(self._decode))]
                    self._graphs[self._choice.greedy] = graphs
                else:
                    self._replays_itself = all(session.replay_itself() for session in self._decode)
        self._wait()

    def _bind(self, shape: Sequence[int]) -> None:
        """Have prompts of ``shape`` [batch, length] bound."""
        self._prepared = None
        if self._bound == tuple(shape):
            return
        self.generation += 1
        self._bound = ()
        self._logits.fill_(float("nan"))
        self._prompts.bind(shape[0], shape[1], self._logits)
        self._bound = tuple(shape)
        self._turn = 0
        self._wait()

    def _hold(self, prompts: Tensor, lengths: Tensor) -> None:
        """Take ``prompts`` [batch, length], of which the first ``lengths`` [batch] tokens are real."""
        self._prompts.hold(prompts, lengths)
        self._lengths.copy_(lengths)

    def prefill(self) -> None:
        self.run_prompts()
        self._count.zero_()
        self._choose()

    def bind_prompts(self, tokens: Tensor) -> None:
        """Allocate and bind everything for prompts ``tokens`` [batch, length] int64, and run them once: kernels are
        compiled."""
        self.cache.check(tokens.shape, 0)
        self._bind(tokens.shape)
        self._hold(*aligned(tokens, None))
        with behind_caller(self.stream):
            self.run_prompts()
        self._wait()

    def run_prompts(self) -> None:
        """Launch the pass over the prompts, and a step for each token that it leaves."""
        self._turn, rest = self._prompts.run(self.stream), self._prompts.rest
        self._position.copy_(self._lengths).sub_(rest.shape[1])
        for place in range(rest.shape[1]):
            self._run_step(rest[:, place : place + 1])

    def _run_step(self, token: Tensor) -> None:
        """A step behind ``token`` [batch, 1], whatever was chosen."""
        self._token.copy_(token)
        self._decode[self._turn].run(self.stream)
        self._turn = (self._turn + 1) % len(self._decode)
        self._position.add_(1)

    def decode(self) -> None:
        if graphs := self._graphs.get(self._choice.greedy):
            graphs[self._turn].replay()
        else:
            self._step(self._turn)
        self._turn = (self._turn + 1) % len(self._decode)

    def _step(self, turn: int) -> None:
        self._decode[turn].run(self.stream)
        self._position.add_(1)
        self._choose()

    def _choose(self) -> None:
        self._token.copy_(self._choice.of(self._logits[:, 0], self._count))
        self._tokens.index_copy_(1, self._count, self._token)
        self._count.add_(1)

    def tokens(self) -> Tensor:
        self._wait()
        return self._tokens[:, : int(self._count)].clone()

    def generate(
        self,
        tokens: Tensor,
        new_tokens: int,
        padding: Tensor | None = None,
        sampling: Sampling | None = None,
        stop: frozenset[int] = frozenset(),
        on_tokens: OnTokens | None = None,
    ) -> list[list[int]]:
        """The new tokens of each row of ``tokens`` [batch, length] int64, up to a token of ``stop`` or ``new_tokens``.

        ``on_tokens`` is called with the tokens of one step, one a row (after a row has stopped, whatever comes).
        """
        made: list[list[int]] = [[] for _ in range(len(tokens))]
        stopped = [False] * len(tokens)
        with closing(self.steps(tokens, new_tokens, padding, sampling)) as steps:
            for latest in steps:
                for row, token in enumerate(latest):
                    stopped[row] = stopped[row] or token in stop
                    if not stopped[row]:
                        made[row].append(token)
                if on_tokens is not None:
                    on_tokens(latest)
                if all(stopped):
                    break
        return made

    def steps(
        self, tokens: Tensor, new_tokens: int, padding: Tensor | None = None, sampling: Sampling | None = None
    ) -> Generator[list[int]]:
        """The tokens of each step as they come, one a row; whoever has enough closes it, and the device is then idle.

        The host looks one step behind the device, so that neither waits for the other.
        """
        self._ready(tokens, new_tokens, padding, sampling)
        pending: tuple[Tensor, Any] | None = None
        try:
            for step in range(new_tokens + 1):
                arrived = pending
                if step < new_tokens:
                    with behind_caller(self.stream):
                        self.decode() if step else self.prefill()
                        pending = self._fetched(step)
                if arrived is None:
                    continue
                row_tokens, event = arrived
                if event is not None:
                    event.synchronize()
                yield row_tokens[:, 0].tolist()
        finally:
            self._wait()

    def _fetched(self, step: int) -> tuple[Tensor, Any]:
        """The tokens of ``step`` on their way to the host, and the event that says when they are there."""
        column = self._tokens[:, step : step + 1]
        if self.stream is None:
            return column.clone(), None
        host = torch.empty(column.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(column, non_blocking=True)
        event = torch.cuda.Event()
        event.record(self.stream)
        return host, event

    def forced_logits(self, tokens: Tensor, padding: Tensor | None, decoded: int) -> Tensor:
        """Logits [batch, decoded + 1, vocabulary] behind the last tokens of each row: of the prompt that is left when
        the last ``decoded`` tokens are cut off, and of each of these, run one by one through the cache.

        A row of no more than ``decoded`` tokens keeps one as its prompt; before its logits, those of its prompt are
        repeated."""
        rows, lengths = aligned(tokens, padding, cut=not self.cache.padded)
        rows, lengths = rows.to(self._device), lengths.to(self._device)
        length = rows.shape[1] - decoded
        self.cache.check((len(rows), length), decoded)
        self._bind((len(rows), length))
        self._hold(rows[:, :length], (lengths - decoded).clamp(min=1))
        collected = []
        with behind_caller(self.stream):
            self.run_prompts()
            collected.append(self._logits.clone())
            for _ in range(decoded):
                at = self._position.clamp(max=rows.shape[1] - 1)  # a short row has ended
                self._run_step(rows.gather(1, at.unsqueeze(1)))
                collected.append(self._logits.clone())
        self._wait()
        late = decoded - (lengths - self._lengths)
        steps = (torch.arange(decoded + 1, device=self._device) - late.unsqueeze(1)).clamp(min=0)
        return torch.cat(collected, dim=1).gather(1, steps.unsqueeze(2).expand(-1, -1, self._vocabulary))

    @property
    def held(self) -> Held:
        tensors = {each.data_ptr(): each.nbytes for turn in self._caches for each in turn}  # some have two turns
        activations = sum(each.activation_bytes for each in (self._prefill, *self._decode))
        return Held(sum(tensors.values()), activations)

    def keep_kernels(self) -> None:
        """See :meth:`pipeline.engine.session.Session.keep_kernels`."""
        for each in (self._prefill, *self._decode[:1]):
            each.keep_kernels()

    def prompts_only(self) -> None:
        """Give up the programs of the steps, with their weights: nothing is generated any more.  Not where prompts may
        leave tokens to them, see :class:`pipeline.generate.prompt_pass.ChunkedPrompts`."""
        if not (self.cache.states and self.cache.chunk):
            self._decode, self._graphs = (), {}

    def _wait(self) -> None:
        if self.stream is not None:
            torch.cuda.synchronize()
