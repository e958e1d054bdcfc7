"""The statistics of a lens as figures and tables show them: names, titles and scales."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from mechlens.errors import ArgumentError
from mechlens.results.base import column_name
from mechlens.results.lens import OWN_TOKENS, LogitLensResult

NAMES = ("probability", "entropy", "kl_final", "kl_input")
"""What every lens can be colored by, besides the rank and probability of a token."""


@dataclasses.dataclass(frozen=True, eq=False)
class LensStatistic:
    """A statistic of a lens, as figures and tables show it."""

    title: str
    """With its unit."""
    values: Tensor
    """`[row, batch, read]`; nan where it is undefined."""
    is_rank: bool
    """Whether it belongs on a log axis that begins at 1."""
    is_probability: bool

    def written(self, value: float) -> str:
        """A value as text."""
        if value != value:
            return "undefined"
        return f"{value:,.0f}" if self.is_rank else f"{value:.3f}"

    def scaled(self, values: Tensor) -> Tensor:
        """Values on the color scale, which is logarithmic for ranks."""
        return values.double().log10() if self.is_rank else values.double()

    def bound(self, values: Tensor, high: float | None) -> float:
        """The value at the dark end of the colors: `high`, or the largest of `values`.

        Raises:
            ArgumentError: `high` is not above the light end.
        """
        if high is not None:
            check_high(high, lowest=1 if self.is_rank else 0)
            return float(high)
        if self.is_probability:
            return 1.0
        seen = values[values.isfinite()]
        return max(float(seen.max()) if len(seen) else 0.0, 10.0 if self.is_rank else 1e-6)

    def shares(self, values: Tensor, high: float) -> Tensor:
        """How far along the color scale the values are; above 1 beyond `high`."""
        return self.scaled(values) / (math.log10(high) if self.is_rank else high)


def lens_statistic(result: LogitLensResult, stat: str) -> LensStatistic:
    """A statistic of a lens by the name of its column.

    Args:
        stat: `probability` (of each cell's own top guess), `entropy`, `kl_final`, `kl_input`, or `rank_` or
            `probability_` with `final`, `input`, `next` or one of the result's targets, such as `rank_
            Paris`.

    Raises:
        ArgumentError: there is no such statistic.
        ValueError: it was not computed, or is undefined for this model.
    """
    check_statistic(stat, result.target_ids)
    needed = statistic_needed(stat)
    if needed is not None and needed not in result.statistics:
        raise ValueError(
            f"this lens was made without {needed}, which {stat} needs: add {needed!r} to statistics, or "
            "leave statistics out"
        )
    rank, probability = (result.token_of(stat, kind) for kind in ("rank", "probability"))
    if rank is not None:
        values = result.rank[rank]
    elif probability is not None:
        values = result.probability(probability)
    else:
        values = result.top_probabilities[..., 0] if stat == "probability" else getattr(result, stat)
    if stat == "kl_input" and values.isnan().all():
        raise ValueError(
            "KL(input || layer) is undefined: this model's unembedding is not tied to its embedding, so the "
            "row embed says nothing about the input; use rank_input"
        )
    title = result.column(stat).heading
    return LensStatistic(title, values, rank is not None, stat == "probability" or probability is not None)


def statistic_needed(stat: str) -> str | None:
    """The entry of `statistics` that `logit_lens` must compute for this one; None if none is needed."""
    if stat == "probability":
        return None
    kind = stat.partition("_")[0]
    return {"rank": "rank", "probability": "log_prob"}.get(kind, stat)


def check_statistic(stat: str, targets: Iterable[str]) -> None:
    """Check the name of a statistic, without a lens.

    Raises:
        ArgumentError: there is no such statistic of a lens with these targets.
    """
    of_tokens = [
        f"{kind}_{column_name(token)}"
        for kind in ("rank", "probability")
        for token in (*OWN_TOKENS, *targets)
    ]
    if not {stat, column_name(stat)} & {*NAMES, *of_tokens}:
        needs = f"one of {', '.join([*NAMES, *of_tokens])}"
        raise ArgumentError("stat", needs, stat, "targets add the rank_ and probability_ of a token")


def check_statistics(stats: str | Sequence[str]) -> tuple[str, ...]:
    """One or several names.

    Raises:
        ArgumentError: no name was given.
    """
    names = (stats,) if isinstance(stats, str) else tuple(stats)
    if not names:
        raise ArgumentError("stats", f"at least one of {', '.join(NAMES)} and rank_final", names)
    return names


def check_high(high: float, *, lowest: float = 0) -> None:
    """Check the value of the darkest color.

    Raises:
        ArgumentError: it is not a finite number above the value of the lightest color.
    """
    if not lowest < high < math.inf:
        raise ArgumentError("high", f"a finite number above {lowest}", high)
