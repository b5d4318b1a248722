"""The most likely token, again and again, by running the whole sequence for each: an answer for people to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from passes.errors import UserError
from pipeline.trace.call_form import make_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.engine.runner import Engine


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


def chat_form(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens that the model expects of ``messages`` (each with ``role`` and ``content``) before its own turn; their
    texts as they stand where the tokenizer has no chat form.  Raises what the tokenizer's template raises."""
    if not tokenizer.chat_template:
        return list(tokenizer("\n".join(message["content"] for message in messages)).input_ids)
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def chat_tokens(tokenizer: PreTrainedTokenizerBase, question: str) -> Tensor:
    """``question`` as the tokens [1, length] that the model expects of a user's turn."""
    return torch.tensor([chat_form(tokenizer, [{"role": "user", "content": question}])])


def answer(engine: Engine, tokenizer: PreTrainedTokenizerBase, question: str, max_new_tokens: int = 64) -> str:
    """The model's greedy answer to a chat question (a plain continuation where the tokenizer has no chat form)."""
    first = engine.inputs[0]
    if first.batch != 1 or not first.dynamic:
        raise UserError("answer: needs an engine with a dynamic length and batch 1 (shape=dynamic)")
    names, stop = [spec.name for spec in engine.inputs], frozenset({tokenizer.eos_token_id} - {None})
    tokens = greedy(engine, names, chat_tokens(tokenizer, question).cuda(), max_new_tokens, stop, first.max)
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
