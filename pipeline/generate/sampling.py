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
        return _drawn(logits, draw, self.temperature, self.top_p)


class Choice:
    """The choice of one token after another, in a CUDA graph too: all that differs between generations, but whether
    they are greedy, is read from the device."""

    def __init__(self, steps: int, batch: int, device: torch.device) -> None:
        """``steps``: of a generation at most."""
        self.greedy = True
        self._draws = torch.zeros(steps, batch, device=device)
        self._temperature, self._top_p = torch.ones(2, device=device)

    def prepare(self, sampling: Sampling, steps: int) -> None:
        """The next ``steps`` tokens are chosen by ``sampling``."""
        self.greedy = sampling.temperature == 0
        if not self.greedy:
            self._draws[:steps] = sampling.draws(steps, self._draws.shape[1], self._draws.device)
            self._temperature.fill_(sampling.temperature)
            self._top_p.fill_(sampling.top_p)

    def of(self, logits: Tensor, step: Tensor) -> Tensor:
        """[batch, 1] int64, for ``logits`` [batch, vocabulary] of ``step`` [1] int64."""
        if self.greedy:
            return logits.argmax(-1, keepdim=True)
        draw = self._draws.index_select(0, step).squeeze(0)
        return _drawn(logits, draw, self._temperature, self._top_p)


def _drawn(logits: Tensor, draw: Tensor, temperature: float | Tensor, top_p: float | Tensor) -> Tensor:
    probabilities, tokens = torch.softmax(logits.float() / temperature, -1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    reached = probabilities.cumsum(-1)
    total = reached[:, -1:]
    place = torch.searchsorted(reached, draw.unsqueeze(1) * total, right=True)
    last = (reached < total).sum(-1, keepdim=True)  # where a product that is rounded to the total belongs
    return tokens.gather(1, torch.minimum(place, last))
