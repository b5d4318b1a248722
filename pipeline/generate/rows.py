"""The rows of a batch of prompts, each with its tokens first and its padding behind them."""

from __future__ import annotations

import torch
from torch import Tensor


def aligned(tokens: Tensor, padding: Tensor | None, cut: bool = False) -> tuple[Tensor, Tensor]:
    """``tokens`` [batch, length] with the padding of each row behind its tokens, and the tokens' number [batch].

    ``padding`` [batch, length] bool is True at padding, which is at one end of each row.  ``cut``: no longer than the
    longest row, for a model to which it matters how long all of it is.
    """
    batch, length = tokens.shape
    if padding is None:
        return tokens, torch.full((batch,), length, dtype=torch.int64, device=tokens.device)
    padding = padding.to(tokens.device)
    lengths = (~padding).sum(1)
    first = (~padding).int().argmax(1, keepdim=True)
    places = (torch.arange(length, device=tokens.device) + first) % length
    rows = tokens.gather(1, places)
    return (rows[:, : int(lengths.max())] if cut else rows), lengths
