"""Whether two sets of features have the same best tokens."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.measures.statistics import exact_interval
from mechlens.results.base import ModelInfo, Result

if TYPE_CHECKING:
    import pandas as pd

ALIGNED, CHANCE = "aligned", "no more than chance"


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of the features, beside what chance gives."""

    value: float
    low: float
    """Lower end of the 95% interval."""
    high: float
    chance: float

    @property
    def verdict(self) -> str:
        """`aligned` where the whole interval lies above chance, else `no more than chance`; empty where the
        share is undefined."""
        if not (self.low == self.low and self.chance == self.chance):
            return ""
        return ALIGNED if self.low > self.chance else CHANCE

    def __str__(self) -> str:
        """In words: `0.166 (0.120 to 0.225); chance 0.0096`."""
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f}); chance {self.chance:.4f}"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureAlignment(Result):
    """How often the same feature has the same best tokens in two layers, held against chance.

    A feature that no token excites, such as a neuron at 0 for all of them, has no best token. It is left out
    of the shares and of chance for each pair of layers in one of which it has none.
    """

    other: ModelInfo
    """Whose features they are compared with; `model` itself where layers of one search are compared."""
    within: bool
    """Whether layers of one and the same search are compared."""
    site: str
    other_site: str
    layers: tuple[int, ...]
    other_layers: tuple[int, ...]
    features: tuple[int, ...]
    """Those that both searches have."""
    top_k: int
    """How many of the best tokens the overlap is of."""
    prefix: Int[Tensor, " prefix"]
    other_prefix: Int[Tensor, " other_prefix"]
    excited: Bool[Tensor, "layer feature"]
    """Whether there is a token that excites the feature."""
    other_excited: Bool[Tensor, "other_layer feature"]
    same: Bool[Tensor, "layer other_layer feature"]
    """Whether the best token is the same; not so where one has none."""
    overlap: Float[Tensor, "layer other_layer feature"]
    """Share of the `top_k` best tokens that are the same, in any order, in [0, 1]; nan where one has none. A
    token that does not excite the feature is not among them, so that a list may be shorter than `top_k`."""
    chance_same: Float[Tensor, "layer other_layer"]
    """How often the best tokens of two features with unlike numbers are the same; nan for one feature."""
    chance_overlap: Float[Tensor, "layer other_layer"]
    """Mean overlap of two features with unlike numbers; nan for one feature."""
    is_index: Bool[Tensor, "layer feature"]
    """Whether the best token's id is the feature's number, as an artefact of decoding would have it; not so
    where there is no best token."""
    other_is_index: Bool[Tensor, "other_layer feature"]

    @property
    def compared(self) -> Bool[Tensor, "layer other_layer feature"]:
        """Which features count for two layers: those that some token excites in both."""
        return self.excited[:, None] & self.other_excited

    def pairs(self) -> list[tuple[int, int]]:
        """The layers whose mean is the summary: each with each later one where layers of one search are
        compared, each with itself in the other model otherwise (or, with none in common, all with all)."""
        if self.within:
            return [(one, other) for one in self.layers for other in self.other_layers if one < other]
        common = [(layer, layer) for layer in self.layers if layer in self.other_layers]
        return common or [(one, other) for one in self.layers for other in self.other_layers]

    def share(self, what: str = "same", pairs: list[tuple[int, int]] | None = None) -> Share:
        """A share over the features that count, mean over pairs of layers.

        The interval is Clopper and Pearson's with one observation per feature, whose spread a mean over pairs
        can only make smaller. Where features are left out it takes the harmonic mean of how many count. Pairs
        in which fewer than two do, of which there is no chance, are left out where others have more.

        Args:
            what: `same` (the best token) or `overlap` (of the `top_k` best).
            pairs: (layer, other layer); None takes `pairs()`.

        Raises:
            ValueError: an unknown share, or a layer that was not compared.
        """
        if what not in ("same", "overlap"):
            raise ValueError(f"the share is `same` or `overlap`, but is {what!r}")
        pairs = self.pairs() if pairs is None else pairs
        for one, other in pairs:
            if one not in self.layers or other not in self.other_layers:
                raise ValueError(
                    f"layers {one} and {other} were not compared: there are {self.layers} and "
                    f"{self.other_layers}"
                )
        values, chance = (
            (self.same, self.chance_same) if what == "same" else (self.overlap, self.chance_overlap)
        )
        rows = [self.layers.index(one) for one, _ in pairs]
        columns = [self.other_layers.index(other) for _, other in pairs]
        counted = self.compared[rows, columns]
        n = counted.sum(-1)
        some = n > 1 if (n > 1).any() else n > 0
        by_chance = float(chance[rows, columns][some].double().mean())
        return _mean_share(values[rows, columns][some], counted[some], by_chance)

    def index_share(self, other: bool = False) -> Share:
        """How often the best token's id is the feature's number, mean over layers; of features that have one.

        Args:
            other: of the features that are compared with.

        Returns:
            The share; nan for directions, whose numbers mean nothing.
        """
        if self.site == "direction":
            return Share(*[float("nan")] * 4)
        found, counted, model = (
            (self.other_is_index, self.other_excited, self.other)
            if other
            else (self.is_index, self.excited, self.model)
        )
        some = counted.any(-1)
        return _mean_share(found[some], counted[some], 1 / model.d_vocab)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair of layers: layer, other_layer, features (that count), same, same_low, same_high,
        same_chance, overlap, overlap_low, overlap_high, overlap_chance, verdict (of the best token).

        Of one search it is each layer with each later one, of two each of the one with each of the other.
        """
        import pandas as pd

        every = [(one, other) for one in self.layers for other in self.other_layers]
        n_compared = self.compared.sum(-1)
        rows = []
        for one, other in self.pairs() if self.within else every:
            same, overlap = (self.share(what, [(one, other)]) for what in ("same", "overlap"))
            numbers = [
                number
                for share in (same, overlap)
                for number in (share.value, share.low, share.high, share.chance)
            ]
            n = int(n_compared[self.layers.index(one), self.other_layers.index(other)])
            rows.append((one, other, n, *numbers, same.verdict))
        columns = ["layer", "other_layer", "features"]
        columns += [
            f"{what}{end}" for what in ("same", "overlap") for end in ("", "_low", "_high", "_chance")
        ]
        return pd.DataFrame(rows, columns=[*columns, "verdict"])


def _mean_share(
    values: Bool[Tensor, "row feature"] | Float[Tensor, "row feature"],
    counted: Bool[Tensor, "row feature"],
    chance: float,
) -> Share:
    """The mean over rows of the mean over the features that count, of which each row has one at least."""
    if not len(values):
        return Share(*[float("nan")] * 4)
    n = counted.sum(-1)
    value = float((torch.where(counted, values.double(), 0.0).sum(-1) / n).mean())
    # A mean's deviation is at most the mean deviation of its rows, and that, by Cauchy and Schwarz, at most
    # the one of the mean share with the harmonic mean of the observations; which, where it is whole, may miss
    # that by a rounding.
    low, high = exact_interval(value, int(statistics.harmonic_mean(n.tolist()) + 1e-6))
    return Share(value, low, high, chance)
