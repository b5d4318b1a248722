"""Greedy generation without a cache: one forward pass over the whole prefix for each new token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.export import make_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
