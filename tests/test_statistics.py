"""What is made of samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.measure.statistics import bootstrap_medians, drifts, median_interval, quantile, summarise

times = st.lists(st.floats(1e-3, 1e4, allow_nan=False), min_size=1, max_size=300)


@settings(max_examples=50, deadline=None)
@given(times, st.randoms(use_true_random=False))
def test_a_summary_does_not_depend_on_the_order_of_samples(samples: list[float], random) -> None:
    shuffled = random.sample(samples, len(samples))
    assert summarise(samples) == summarise(shuffled)


@settings(max_examples=50, deadline=None)
@given(times)
def test_median_mad_and_interval_are_where_they_must_be(samples: list[float]) -> None:
    summary = summarise(samples)
    low, high = summary.ci95
    assert summary.n == len(samples)
    assert min(samples) <= low <= summary.median <= high <= max(samples)
    assert 0.0 <= summary.mad <= max(samples) - min(samples)
    assert np.sum(np.abs(np.array(samples) - summary.median) <= summary.mad * (1 + 1e-9)) * 2 >= len(samples)


@settings(max_examples=50, deadline=None)
@given(times, st.floats(0.01, 100.0))
def test_a_summary_scales_with_its_unit(samples: list[float], factor: float) -> None:
    scaled, summary = summarise([factor * x for x in samples]), summarise(samples)
    for key in ("median", "mad", "ci95"):
        assert getattr(scaled, key) == pytest.approx(
            np.multiply(factor, getattr(summary, key)), rel=1e-9, abs=1e-9 * factor * max(samples)
        )


@pytest.mark.parametrize("n", [1, 2, 5, 6, 51])
def test_medians_are_distributed_as_in_a_bootstrap_done_the_long_way(n: int) -> None:
    resamples = 40_000
    short = bootstrap_medians(list(range(n)), seed=0, resamples=resamples)
    long = np.median(np.random.default_rng(1).integers(n, size=(resamples, n)), axis=1)
    assert short.mean() == pytest.approx((n - 1) / 2, abs=5 * long.std() / resamples**0.5)
    assert short.std() == pytest.approx(long.std(), rel=0.03)
    for value in np.unique(long):
        expected = (long == value).mean()
        assert (short == value).mean() == pytest.approx(expected, abs=5 * (2 * expected / resamples) ** 0.5)


def test_the_interval_holds_the_true_median_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        low, high = median_interval(random.normal(size=60).tolist(), resamples=1000)
        hits += low <= 0.0 <= high
    assert 0.90 <= hits / 400 <= 0.99


@pytest.mark.parametrize(("n", "known"), [(199, False), (200, True)])
def test_a_tail_quantile_needs_ten_samples_beyond_it(n: int, known: bool) -> None:
    samples = [float(i) for i in range(n)]
    assert (quantile(samples, 0.95) is not None) is known
    assert (quantile(samples, 0.05) is not None) is known
    if known:
        assert quantile(samples, 0.95) == pytest.approx(0.95 * (n - 1))
    assert quantile(samples[:100], 0.9) is not None
    assert quantile(samples[:99], 0.9) is None


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")]])
def test_no_samples_and_samples_that_are_no_numbers_are_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match="samples"):
        summarise(samples)


def test_drift_is_a_shift_beyond_both_noise_and_one_percent() -> None:
    noise = np.random.default_rng(0).normal(scale=0.1, size=200)
    first_half = np.arange(200) < 100
    assert not drifts((10 + noise).tolist())
    assert drifts((10 + noise + 0.5 * ~first_half).tolist())
    assert drifts((10 + noise + 0.5 * first_half).tolist())
    assert not drifts((10 + noise / 100 + 0.05 * first_half).tolist()), "half a percent is no finding"
    assert not drifts((10 + 30 * noise + 0.5 * first_half).tolist()), "lost in the noise"


def test_steady_noise_is_rarely_called_drift() -> None:
    random = np.random.default_rng(0)
    assert sum(drifts((10 + random.normal(size=100)).tolist()) for _ in range(300)) <= 9
