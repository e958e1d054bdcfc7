"""Intervals."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor


def bootstrap_interval(
    samples: Float[Tensor, "sample *value"], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[Float[Tensor, "*value"], Float[Tensor, "*value"]]:
    """Percentile bootstrap interval of the mean over independent samples.

    Args:
        samples: one row per independent observation; nan rows of a value are left out of its mean.
        confidence: coverage of the interval, in (0, 1).
        resamples: how many resamples are drawn.
        seed: of the generator that draws them.

    Returns:
        Lower and upper bound, in the samples' unit; nan where there is only one sample.

    Raises:
        ValueError: no samples, or a confidence outside (0, 1).

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    Cost: one matrix product of [resamples, sample] with the samples.
    """
    if len(samples) == 0:
        raise ValueError("a bootstrap interval needs at least 1 sample, but there is none")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, but it is {confidence}")
    n = len(samples)
    if n == 1:
        unknown = torch.full_like(samples[0], torch.nan)
        return unknown, unknown.clone()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (resamples, n), generator=generator)
    # how often each sample was drawn in each resample: means of all values are then one product
    counts = torch.zeros(resamples, n, dtype=torch.double)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.double))
    flat = samples.detach().cpu().double().reshape(n, -1)
    known = ~flat.isnan()
    means = (counts @ flat.nan_to_num(0)) / (counts @ known.double())
    tail = (1 - confidence) / 2
    low, high = means.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.double), dim=0)
    shape = samples.shape[1:]
    return low.reshape(shape).to(samples.dtype), high.reshape(shape).to(samples.dtype)


def central_interval(samples: Float[Tensor, " sample"], share: float = 0.99) -> tuple[float, float]:
    """The interval that leaves out an equal share of the samples at either end.

    Raises:
        ValueError: no samples, or a share outside (0, 1).
    """
    if len(samples) == 0:
        raise ValueError("an interval needs at least 1 sample, but there is none")
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, but it is {share}")
    tail = (1 - share) / 2
    low, high = samples.double().quantile(torch.tensor([tail, 1 - tail], dtype=torch.double)).tolist()
    return low, high


def wilson_interval(share: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share, which is not empty where the share is 0 or 1.

    It also covers the mean of values within [0, 1], whose variance is at most that of zeros and ones.

    Args:
        share: in [0, 1]; nan gives nan.
        n: independent observations.
        confidence: coverage of the interval, in (0, 1).

    Raises:
        ValueError: a share outside [0, 1], no observation, or a confidence outside (0, 1).

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if n < 1:
        raise ValueError(f"an interval needs at least 1 observation, but n is {n}")
    if share < 0 or share > 1:
        raise ValueError(f"a share lies between 0 and 1, but is {share}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, but it is {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # rounding must not put an end beyond the share itself
    low, high = ((middle + side * half) / (1 + z * z / n) for side in (-1, 1))
    return min(share, max(0.0, low)), max(share, min(1.0, high))
