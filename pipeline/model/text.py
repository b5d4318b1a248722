"""Input tokens: real English text where there is a tokenizer, seeded random tokens where there is none."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

import torch

from passes.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.model.load import LoadedModel


def tokens_for(
    loaded: LoadedModel, batch: int, length: int, seed: int, device: torch.device | None = None
) -> torch.Tensor:
    """The tokens on which a model is judged and timed, int64 ``[batch, length]`` on ``device``, by default the model's;
    see :func:`token_batch`.

    Nothing is timed on one token again and again: over equal rows a card switches fewer bits, and clocks higher.
    """
    vocabulary = loaded.model.config.get_text_config().vocab_size
    return token_batch(loaded.tokenizer, vocabulary, batch, length, seed).to(device or loaded.model.device)


def token_batch(
    tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, batch: int, length: int, seed: int
) -> torch.Tensor:
    """Token ids, int64 ``[batch, length]`` on the CPU; the same arguments always give the same tokens.

    With a tokenizer every row is a piece of ``prompts.txt`` from an offset of its own, behind the
    begin-of-sequence token where the tokenizer puts one; past the end the text starts again.
    Without a tokenizer the tokens are uniform over ``[0, vocab_size)``.
    """
    generator = torch.Generator().manual_seed(seed)
    if tokenizer is None:
        return torch.randint(vocab_size, (batch, length), generator=generator)

    text = files("pipeline.model").joinpath("prompts.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    if int(tokens.max()) >= vocab_size:
        raise UserError(
            f"tokenizer: gives token {int(tokens.max())}, the model has vocab_size={vocab_size}; they do not match"
        )

    # A permutation, so that the rows of one batch cannot be equal; it repeats only past len(tokens) rows.
    offsets = torch.randperm(len(tokens), generator=generator)[torch.arange(batch) % len(tokens)]
    rows = tokens[(offsets[:, None] + torch.arange(length)) % len(tokens)]
    begin = tokenizer.bos_token_id
    if begin is not None and tokenizer("a").input_ids[0] == begin:
        rows = torch.cat([torch.full((batch, 1), begin), rows], dim=1)[:, :length]
    return rows
