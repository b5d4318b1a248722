"""The choice of the next token, on the device and without a look from the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from passes.errors import UserError

BELOW_ONE = 1 - 2**-24
"""The largest float32 below 1."""


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy.  Otherwise tokens are drawn from the fewest whose probabilities reach ``top_p``
    (nucleus sampling, Holtzman et al. 2020); the same ``seed`` draws the same tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature}: must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: must lie above 0 and be at most 1")

    def draws(self, steps: int, batch: int, device: torch.device) -> Tensor:
        """[steps, batch] in [0, 1): the random numbers of a whole generation, the same on every device."""
        source = torch.Generator().manual_seed(self.seed)
        draws = torch.rand(steps, batch, generator=source, dtype=torch.float64)
        return draws.float().clamp(max=BELOW_ONE).to(device)  # one draw in 2^25 is rounded to 1

    def choose(self, logits: Tensor, draw: Tensor) -> Tensor:
        """[batch, 1] int64, for ``logits`` [batch, vocabulary] and one random number a row, ``draw`` [batch]."""
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        probabilities, tokens = torch.softmax(logits.float() / self.temperature, -1).sort(-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        reached = probabilities.cumsum(-1)
        total = reached[:, -1:]
        place = torch.searchsorted(reached, draw.unsqueeze(1) * total, right=True)
        last = (reached < total).sum(-1, keepdim=True)  # where a product that is rounded to the total belongs
        return tokens.gather(1, torch.minimum(place, last))
