"""What generates, as the benchmark and the verification see it; and greedy generation without a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from passes.errors import RunError
from pipeline.trace.call_form import make_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def captured(stream: torch.cuda.Stream | None, launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """What ``launch`` launches as a CUDA graph; raises :class:`RunError` of kind ``cuda_graph`` where it cannot be."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            launch()
    except RuntimeError as error:
        raise RunError("cuda_graph", f"the engine cannot be captured: {str(error).splitlines()[0]}") from error
    return graph


def greedy(
    forward: Callable[[dict[str, Tensor]], Tensor],
    names: list[str],
    tokens: Tensor,
    max_new_tokens: int,
    stop: frozenset[int],
    longest: int,
) -> Iterator[int]:
    """Continue ``tokens`` [1, length], until a token of ``stop`` or ``longest`` tokens in all."""
    for _ in range(max_new_tokens):
        if tokens.shape[1] > longest:
            return
        token = int(forward(make_inputs(names, tokens))[0, -1].argmax())
        if token in stop:
            return
        yield token
        tokens = torch.cat([tokens, tokens.new_tensor([[token]])], dim=1)


def chat_tokens(tokenizer: PreTrainedTokenizerBase, question: str) -> Tensor:
    """``question`` as the tokens [1, length] that the model expects of a user's turn."""
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    return torch.tensor([tokenizer(question).input_ids])
