"""Confidence intervals, rank correlation and largest values."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.arguments import generator_of


def bootstrap_interval(
    samples: Float[Tensor, "sample *value"], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[Float[Tensor, "*value"], Float[Tensor, "*value"]]:
    """Percentile bootstrap interval of the mean over independent samples.

    Args:
        samples: one row per independent observation; nan values are left out of the mean.
        confidence: coverage of the interval, in (0, 1).
        resamples: number of bootstrap resamples.
        seed: seed of the generator that draws the resamples.

    Returns:
        Lower and upper bound, in the samples' unit; nan if there is only one sample.

    Raises:
        ValueError: no samples, or a confidence outside (0, 1).

    References: Efron 1979, "Bootstrap methods: another look at the jackknife".
    Cost: one matrix product of [resamples, sample] with the samples.
    """
    if len(samples) == 0:
        raise ValueError("a bootstrap interval needs at least 1 sample, but there is none")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if len(samples) == 1:
        unknown = torch.full_like(samples[0], torch.nan)
        return unknown, unknown.clone()
    counts = _draws(len(samples), resamples, seed)
    flat = samples.detach().cpu().double().reshape(len(samples), -1)
    known = ~flat.isnan()
    means = (counts @ flat.nan_to_num(0)) / (counts @ known.double())
    low, high = _percentiles(means, confidence)
    shape = samples.shape[1:]
    return low.reshape(shape).to(samples.dtype), high.reshape(shape).to(samples.dtype)


def _draws(n: int, resamples: int, seed: int) -> Float[Tensor, "resample sample"]:
    """How often each resample draws each sample: the means of all values are then one matrix product."""
    drawn = torch.randint(n, (resamples, n), generator=generator_of(seed))
    counts = torch.zeros(resamples, n, dtype=torch.double)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.double))


def _percentiles(found: Float[Tensor, "resample value"], confidence: float) -> Float[Tensor, "2 value"]:
    tail = (1 - confidence) / 2
    return found.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.double), dim=0)


def ratio_of_means(
    part: Float[Tensor, " sample"],
    whole: Float[Tensor, " sample"],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The ratio of two means over the same samples, with its percentile bootstrap interval.

    Args:
        part, whole: one value each per independent observation; resamples draw both together.
        confidence: coverage of the interval, in (0, 1).

    Returns:
        Ratio, lower and upper bound; the ratio is nan where the mean of `whole` is 0, the bounds also for a
        single sample.

    References: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    both = torch.stack([part, whole], 1).detach().cpu().double()
    top, bottom = both.mean(0).tolist()
    ratio = top / bottom if bottom else math.nan
    if len(both) == 1 or ratio != ratio:
        return ratio, math.nan, math.nan
    means = _draws(len(both), resamples, seed) @ both
    low, high = _percentiles(means[:, :1] / means[:, 1:], confidence)
    return ratio, float(low), float(high)


def central_interval(samples: Float[Tensor, " sample"], share: float = 0.99) -> tuple[float, float]:
    """The interval that contains the central `share` of the samples, with equal shares outside at each end.

    Raises:
        ValueError: no samples, or a share outside (0, 1).
    """
    if len(samples) == 0:
        raise ValueError("an interval needs at least 1 sample, but there is none")
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    tail = (1 - share) / 2
    low, high = samples.double().quantile(torch.tensor([tail, 1 - tail], dtype=torch.double)).tolist()
    return low, high


def exact_interval(share: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's exact confidence interval for a proportion.

    `share * n` need not be a whole number, as for a mean of values in [0, 1]: the lower end is then that of
    the next smaller whole number, and the upper end that of the next larger one.

    Args:
        share: in [0, 1]; nan gives nan.
        n: number of independent observations.
        confidence: coverage of the interval, in (0, 1), with at most half of the rest missed at each end.

    Raises:
        ValueError: a share outside [0, 1], no observation, or a confidence outside (0, 1).

    References: Clopper and Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of
    the binomial".
    """
    if n < 1:
        raise ValueError(f"an interval needs at least 1 observation, but n is {n}")
    if share < 0 or share > 1:
        raise ValueError(f"a share must be between 0 and 1, got {share}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if share != share:
        return math.nan, math.nan
    # slow to import
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    # share * n may differ from a whole number by rounding
    fewer, more = math.floor(share * n + 1e-6), math.ceil(share * n - 1e-6)
    low = 0.0 if fewer == 0 else float(betaincinv(fewer, n - fewer + 1, tail))
    high = 1.0 if more == n else float(betaincinv(more + 1, n - more, 1 - tail))
    return low, high


def rank_correlation(
    a: Float[Tensor, "*batch value"], b: Float[Tensor, "*batch value"]
) -> Float[Tensor, "*batch"]:
    """Spearman's rank correlation along the last axis; ties get their mean rank.

    Returns:
        In [-1, 1]; nan where all values of `a` or of `b` are equal.

    References: Spearman 1904, "The proof and measurement of association between two things".
    """
    first, second = _centered_ranks(a), _centered_ranks(b)
    return torch.linalg.vecdot(first, second) / (first.norm(dim=-1) * second.norm(dim=-1))


def _centered_ranks(values: Float[Tensor, "*batch value"]) -> Float[Tensor, "*batch value"]:
    """Twice the ranks, minus the mean, in float64."""
    values = values.contiguous()
    ordered = values.sort(-1).values
    below, up_to = (torch.searchsorted(ordered, values, right=right).double() for right in (False, True))
    ranks = below + up_to
    return ranks - ranks.mean(-1, keepdim=True)


def is_largest(values: Float[Tensor, "*batch option"]) -> Bool[Tensor, "*batch option"]:
    """Whether each value is larger than all others of its row; no value is where the largest are equal."""
    at_top = values == values.amax(-1, keepdim=True)
    return at_top & (at_top.sum(-1, keepdim=True) == 1)


def simultaneous_interval(
    mean: Float[Tensor, "*cell"], standard_error: Float[Tensor, "*cell"], n: int, *, confidence: float = 0.95
) -> tuple[Float[Tensor, "*cell"], Float[Tensor, "*cell"]]:
    """Student's t intervals of many means that together hold with the given confidence (Bonferroni).

    Args:
        mean, standard_error: by cell; cells whose mean is nan are not counted.
        n: independent observations behind each mean.
        confidence: chance that all intervals hold at once, in (0, 1).

    Returns:
        Lower and upper bounds; nan for a single observation.

    Raises:
        ValueError: a confidence outside (0, 1).

    References: Dunn 1961, "Multiple comparisons among means".
    """
    reach = _quantile(1 - _tail(mean, confidence), n) * standard_error
    return mean - reach, mean + reach


def observations_needed(
    size: float, spread: Float[Tensor, "*cell"], *, confidence: float = 0.95, power: float = 0.8
) -> Float[Tensor, "*cell"]:
    """How many observations an effect needs, so that its simultaneous interval excludes 0.

    Args:
        size: of the effect, in the unit of `spread`.
        spread: standard deviation of each cell's observations; cells that are nan are not counted.
        confidence: of `simultaneous_interval`.
        power: chance of finding an effect of this size, in (0, 1).

    Returns:
        The smallest sufficient number by cell, at least 2; nan where the spread is nan.

    Raises:
        ValueError: a size of 0 or nan; a confidence or power outside (0, 1).

    References: Cohen 1988, "Statistical Power Analysis for the Behavioral Sciences".
    """
    if not size or size != size:
        raise ValueError(f"the size of an effect must not be 0, got {size}")
    if not 0 < power < 1:
        raise ValueError(f"power must be between 0 and 1, got {power}")
    tail = _tail(spread, confidence)

    def enough(n: Tensor) -> Tensor:
        return (_quantile(1 - tail, n) + _quantile(power, n)) * spread <= abs(size) * n.sqrt()

    high = torch.full_like(spread, 2.0, dtype=torch.double)
    while not (enough(high) | spread.isnan() | spread.isinf()).all():
        high = torch.where(enough(high), high, 2 * high)
    low = torch.ones_like(high)
    while (high - low > 1).any():
        middle = ((low + high) / 2).floor()
        fits = enough(middle)
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return high.masked_fill(spread.isnan(), torch.nan)


def _tail(values: Tensor, confidence: float) -> float:
    """The chance that each interval may miss at either end."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return (1 - confidence) / 2 / max(1, int((~values.isnan()).sum()))


def _quantile(chance: float, n: int | Tensor) -> Any:
    """Of Student's t distribution, for the mean of n observations."""
    # slow to import
    from scipy.special import stdtrit

    if isinstance(n, Tensor):
        return torch.from_numpy(stdtrit((n - 1).numpy(), chance))
    return float(stdtrit(n - 1, chance)) if n > 1 else math.nan
