"""How many times as long, and how sure: ratios of medians with bootstrap intervals.

The interval of one report speaks of the samples of one process.  Several reports of the same settings are resampled
as wholes too (two stages: reports, then samples; Davison and Hinkley, Bootstrap Methods, section 3.8), so that what
differs from process to process and from build to build shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.compare.rows import Figure
from pipeline.measure.statistics import bootstrap_medians

RESAMPLES = 2000
NORMAL_95 = 1.96  # half the width of a 95 % interval of a normal distribution, in standard deviations


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether 1 lies outside of the interval."""
        return self.low > 1 or self.high < 1

    @property
    def inverse(self) -> Ratio:
        """How many times as fast, of how many times as long."""
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low)

    @property
    def short(self) -> str:
        """Times as fast; the interval only where its digits say more than the value's."""
        digits = {f"{end:.2f}" for end in (self.value, self.low, self.high)}
        return f"{self.value:.2f}×" + (f" ({self.low:.2f}–{self.high:.2f})" if len(digits) > 1 else "")

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}–{self.high:.2f})"


def ratio(numerator: Sequence[Figure], denominator: Sequence[Figure]) -> Ratio:
    """The time of ``numerator`` over that of ``denominator``, each one figure or repetitions of one measurement."""
    low, high = np.quantile(_draws(numerator, seed=0) / _draws(denominator, seed=1), (0.025, 0.975))
    return Ratio(_centre(numerator) / _centre(denominator), float(low), float(high))


def spread(figures: Sequence[Figure]) -> tuple[float, float]:
    """The 95 % interval of the mean of the medians of ``figures``, repetitions of one measurement."""
    low, high = np.quantile(_draws(figures, seed=0), (0.025, 0.975))
    return float(low), float(high)


def _centre(figures: Sequence[Figure]) -> float:
    return float(np.mean([figure.median for figure in figures]))


def _draws(figures: Sequence[Figure], seed: int) -> npt.NDArray[np.float64]:
    """[RESAMPLES] draws from the bootstrap distribution of the mean of the figures' medians."""
    random = np.random.default_rng((seed, 2))
    each = np.stack([_draws_of_one(figure, seed + 2 * i) for i, figure in enumerate(figures)])
    if len(figures) == 1:
        return np.asarray(each[0])
    chosen = random.integers(len(figures), size=each.shape)
    return np.take_along_axis(each, chosen, axis=0).mean(axis=0)


def _draws_of_one(figure: Figure, seed: int) -> npt.NDArray[np.float64]:
    """Resampled medians; without samples, a normal distribution on each side that has the interval's width."""
    if figure.samples:
        return bootstrap_medians(figure.samples, seed, RESAMPLES)
    z = np.random.default_rng(seed).standard_normal(RESAMPLES)
    below, above = (figure.median - figure.low) / NORMAL_95, (figure.high - figure.median) / NORMAL_95
    draws = figure.median + z * np.where(z < 0, below, above)
    return np.maximum(draws, figure.median / 1000)  # no time is negative
