"""Summaries of timing samples: median, spread, interval and drift (rule 5 of measuring: no mean, no lone best)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.measure.sections import Summary

RESAMPLES = 10_000
DRIFT_TOLERANCE = 0.01
"""A shift below 1 % of the median is no finding, however narrow the intervals are."""


def summarise(samples: Sequence[float], seed: int = 0) -> Summary:
    """Summary of at least one sample; raises ValueError for none, or for one that is not finite."""
    ordered = _ordered(samples)
    median = float(np.median(ordered))
    return Summary(
        median=median,
        mad=float(np.median(np.abs(ordered - median))),
        p05=quantile(samples, 0.05),
        p95=quantile(samples, 0.95),
        n=len(ordered),
        ci95=median_interval(samples, seed),
    )


def quantile(samples: Sequence[float], p: float) -> float | None:
    """The ``p``-quantile, or None while fewer than ten samples are expected beyond it (n < 10 / (1-p))."""
    tail = min(p, 1.0 - p)
    if len(samples) * tail < 10.0 - 1e-9:  # 1-p is not exact in binary: 0.9 must ask for 100 samples, not 101
        return None
    return float(np.quantile(_ordered(samples), p))


def median_interval(samples: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Bootstrap percentile interval (95 %) of the median."""
    low, high = np.quantile(bootstrap_medians(samples, seed, resamples), (0.025, 0.975))
    return float(low), float(high)


def bootstrap_medians(samples: Sequence[float], seed: int, resamples: int) -> npt.NDArray[np.float64]:
    """Medians of ``resamples`` resamples [resamples], without drawing the resamples.

    The k-th smallest index of a resample is floor(n U) with U the k-th smallest of n uniform numbers,
    which is Beta(k, n+1-k); given that one, the next is U + (1-U) Beta(1, n-k).  (Order statistics of the
    uniform distribution: David and Nagaraja, Order Statistics, 3rd ed., chapter 2.)  The distribution is
    the bootstrap's own, at a cost that does not grow with n.
    """
    ordered = _ordered(samples)
    n = len(ordered)
    random = np.random.default_rng(seed)
    k = (n + 1) // 2
    lower = random.beta(k, n + 1 - k, resamples)
    upper = lower if n % 2 else lower + (1.0 - lower) * random.beta(1, n - k, resamples)
    return (ordered[_index(lower, n)] + ordered[_index(upper, n)]) / 2


def drifts(samples: Sequence[float], seed: int = 0) -> bool:
    """Whether the second half of the samples, in order of time, differs from the first.

    It does when the 95 % intervals of the two medians are disjoint and the medians are more than
    ``DRIFT_TOLERANCE`` apart.  Fewer than 20 samples never drift: their intervals say nothing.
    """
    if len(samples) < 20:
        return False
    middle = len(samples) // 2
    first, second = samples[:middle], samples[middle:]
    (low_1, high_1), (low_2, high_2) = median_interval(first, seed), median_interval(second, seed)
    before, after = float(np.median(first)), float(np.median(second))
    return (high_1 < low_2 or high_2 < low_1) and abs(after - before) > DRIFT_TOLERANCE * before


def _ordered(samples: Sequence[float]) -> npt.NDArray[np.float64]:
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    if not ordered.size:
        raise ValueError("no samples to summarise")
    if not np.isfinite(ordered).all():
        raise ValueError("samples must be finite")
    return ordered


def _index(uniform: npt.NDArray[np.float64], n: int) -> npt.NDArray[np.int64]:
    return np.minimum((uniform * n).astype(np.int64), n - 1)  # rounding may reach n
