"""Intervals compared with theory, a literal loop and scipy."""

from __future__ import annotations

import math
import random

import pytest
import torch

from mechlens.measures.statistics import (
    bootstrap_interval,
    central_interval,
    exact_interval,
    rank_correlation,
)


def test_interval_of_many_samples_is_the_normal_one():
    samples = torch.randn(4000, generator=torch.Generator().manual_seed(1)).double()
    low, high = bootstrap_interval(samples, confidence=0.95)
    error = 1.96 * float(samples.std()) / math.sqrt(4000)
    # with 2000 resamples, a 2.5% quantile is accurate to about 7% of the half width
    assert float(samples.mean() - low) == pytest.approx(error, rel=0.1)
    assert float(high - samples.mean()) == pytest.approx(error, rel=0.1)


def test_interval_equals_a_literal_bootstrap():
    samples = [0.0, 0.1, 0.4, 0.9, 1.0, 1.0]
    drawn = random.Random(3)
    means = sorted(sum(drawn.choices(samples, k=6)) / 6 for _ in range(20000))
    low, high = bootstrap_interval(torch.tensor(samples), confidence=0.9, resamples=20000)
    # means are multiples of a few hundredths, and two bootstraps may differ by one of them
    assert float(low) == pytest.approx(means[1000], abs=0.03)
    assert float(high) == pytest.approx(means[19000], abs=0.03)


def test_values_are_resampled_jointly_and_keep_their_shape():
    samples = torch.rand(30, 2, 3, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_interval(samples)
    assert low.shape == (2, 3)
    assert (low < samples.mean(0)).all()
    assert (high > samples.mean(0)).all()
    alone = bootstrap_interval(samples[:, 1, 2])
    assert float(alone[0]) == pytest.approx(float(low[1, 2]), abs=1e-6)


def test_one_sample_has_no_interval_and_nan_is_ignored():
    low, high = bootstrap_interval(torch.tensor([0.25]))
    assert low.isnan()
    assert high.isnan()
    low, high = bootstrap_interval(torch.tensor([0.5, torch.nan, 0.5]))
    assert float(low) == float(high) == 0.5
    low, _ = bootstrap_interval(torch.tensor([torch.nan, torch.nan]))
    assert low.isnan()


def test_central_interval_of_a_known_set():
    low, high = central_interval(torch.arange(101.0), share=0.9)
    assert (low, high) == pytest.approx((5, 95))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval(torch.empty(0, 3)), "at least 1 sample"),
        (lambda: bootstrap_interval(torch.ones(3), confidence=95), "between 0 and 1, got 95"),
        (lambda: central_interval(torch.empty(0)), "at least 1 sample"),
        (lambda: central_interval(torch.ones(3), share=1), "between 0 and 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("n", [1, 4, 32, 768])
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_interval_of_a_share_matches_scipy(n, confidence):
    from scipy.stats import binomtest

    for hits in {0, 1, n // 3, n - 1, n}:
        expected = binomtest(hits, n).proportion_ci(confidence_level=confidence, method="exact")
        found = exact_interval(hits / n, n, confidence=confidence)
        # scipy finds the ends by bisection
        assert found == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_an_undefined_share_has_no_interval():
    low, high = exact_interval(math.nan, 5)
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize(
    ("share", "n", "confidence", "message"),
    [
        (0.5, 0, 0.95, "at least 1 observation, but n is 0"),
        (1.5, 4, 0.95, "a share must be between 0 and 1, got 1.5"),
        (0.5, 4, 1.0, "confidence must be between 0 and 1"),
    ],
)
def test_the_interval_of_an_invalid_share_is_refused(share, n, confidence, message):
    with pytest.raises(ValueError, match=message):
        exact_interval(share, n, confidence=confidence)


@pytest.mark.parametrize(("n", "chance"), [(8, 1 / 64), (64, 1 / 512), (768, 1 / 8000), (100, 0.3)])
def test_the_interval_misses_chance_at_the_stated_rate(n, chance):
    # the probability that the whole interval is above chance
    from scipy.stats import binom

    above = sum(
        binom.pmf(hits, n, chance) for hits in range(n + 1) if exact_interval(hits / n, n)[0] > chance
    )
    assert above <= 0.025


def test_a_fractional_number_of_hits_gets_the_wider_interval():
    low, high = exact_interval(2.5 / 10, 10)
    assert low == exact_interval(0.2, 10)[0]
    assert high == exact_interval(0.3, 10)[1]
    # in float64, 7 / 49 * 49 is not 7
    assert exact_interval(7 / 49, 49) == (pytest.approx(0.0594, abs=1e-3), pytest.approx(0.2718, abs=1e-3))


def test_rank_correlations_equal_scipys_with_ties():
    from scipy.stats import spearmanr

    draw = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 5, (2, 3, 12), generator=draw).float()
    found = rank_correlation(a, b)
    for row in range(3):
        assert float(found[row]) == pytest.approx(spearmanr(a[row], b[row]).statistic, abs=1e-12)
    assert rank_correlation(torch.ones(4), torch.arange(4.0)).isnan()
