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
    observations_needed,
    rank_correlation,
    simultaneous_interval,
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


def test_simultaneous_intervals_exclude_0_where_scipys_corrected_test_does():
    from scipy.stats import ttest_1samp

    draw = torch.Generator().manual_seed(0)
    values = torch.randn(12, 40, generator=draw).double() + torch.linspace(0, 3, 40)
    values[:, 7] = math.nan  # not a cell
    error = values.std(0) / math.sqrt(12)
    low, high = simultaneous_interval(values.mean(0), error, 12)
    corrected = [39 * float(ttest_1samp(values[:, at].numpy(), 0).pvalue) for at in range(40)]
    found = ((low > 0) | (high < 0)).tolist()
    assert found == [p < 0.05 for p in corrected]
    assert 5 < sum(found) < 35
    assert low[7].isnan()


def test_intervals_of_a_single_observation_are_unknown():
    low, high = simultaneous_interval(torch.ones(3), torch.full((3,), math.nan), 1)
    assert low.isnan().all()
    assert high.isnan().all()


def test_a_wrong_effect_is_found_among_many_at_the_stated_rate():
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(2000, 8, 30, generator=draw).double()  # simulation, sample, cell
    wrong = 0
    for each in values:
        low, high = simultaneous_interval(each.mean(0), each.std(0) / math.sqrt(8), 8)
        wrong += bool(((low > 0) | (high < 0)).any())
    assert 0.03 < wrong / 2000 < 0.07


def test_the_observations_needed_are_the_first_that_suffice():
    from scipy.stats import t

    spread = torch.tensor([0.0, 0.1, 1.0, 3.0, math.nan], dtype=torch.double)
    found = observations_needed(0.5, spread).tolist()
    assert math.isnan(found.pop())
    for each, sd in zip(found, spread.tolist(), strict=False):
        n = 2
        while (t.ppf(1 - 0.025 / 4, n - 1) + t.ppf(0.8, n - 1)) * sd > 0.5 * math.sqrt(n):
            n += 1
        assert each == n


def test_as_many_observations_as_needed_find_the_effect_at_the_stated_rate():
    (n,) = observations_needed(1.0, torch.ones(1, dtype=torch.double)).int().tolist()
    values = 1 + torch.randn(4000, n, generator=torch.Generator().manual_seed(0)).double()
    low, _ = simultaneous_interval(values.mean(1)[:1], values.std(1)[:1] / math.sqrt(n), n)
    half = float(values.mean(1)[0] - low) / float(values.std(1)[0])
    found = (values.mean(1) > half * values.std(1)).double().mean()
    # the rule's sum of two quantiles is an approximation, on the safe side for few observations
    assert 0.78 < float(found) < 0.88


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 0.0}, "must not be 0"),
        ({"size": math.nan}, "must not be 0, got nan"),
        ({"size": 1.0, "power": 1.0}, "power must be between"),
        ({"size": 1.0, "confidence": 0.0}, "confidence must be between"),
    ],
)
def test_invalid_effects_are_refused(given, message):
    size = given.pop("size")
    with pytest.raises(ValueError, match=message):
        observations_needed(size, torch.ones(2), **given)
