"""Whether two sets of features have the same best tokens."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

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
    """How often the same feature has the same best tokens in two layers, held against chance."""

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
    same: Bool[Tensor, "layer other_layer feature"]
    """Whether the best token is the same."""
    overlap: Float[Tensor, "layer other_layer feature"]
    """Share of the `top_k` best tokens that are the same, in any order, in [0, 1]."""
    chance_same: Float[Tensor, "layer other_layer"]
    """How often the best tokens of two features with unlike numbers are the same; nan for one feature."""
    chance_overlap: Float[Tensor, "layer other_layer"]
    """Mean overlap of two features with unlike numbers; nan for one feature."""
    is_index: Bool[Tensor, "layer feature"]
    """Whether the best token's id is the feature's number, as an artefact of decoding would have it."""
    other_is_index: Bool[Tensor, "other_layer feature"]

    def pairs(self) -> list[tuple[int, int]]:
        """The layers whose mean is the summary: each with each later one where layers of one search are
        compared, each with itself in the other model otherwise (or, with none in common, all with all)."""
        if self.within:
            return [(one, other) for one in self.layers for other in self.other_layers if one < other]
        common = [(layer, layer) for layer in self.layers if layer in self.other_layers]
        return common or [(one, other) for one in self.layers for other in self.other_layers]

    def share(self, what: str = "same", pairs: list[tuple[int, int]] | None = None) -> Share:
        """A share over all features, mean over pairs of layers.

        The interval is Clopper and Pearson's with one observation per feature, whose spread a mean over pairs
        can only make smaller.

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
        if not pairs:
            return Share(*[float("nan")] * 4)
        values, chance = (
            (self.same, self.chance_same) if what == "same" else (self.overlap, self.chance_overlap)
        )
        rows = [self.layers.index(one) for one, _ in pairs]
        columns = [self.other_layers.index(other) for _, other in pairs]
        value = float(values[rows, columns].double().mean())
        low, high = exact_interval(value, len(self.features))
        return Share(value, low, high, float(chance[rows, columns].double().mean()))

    def index_share(self, other: bool = False) -> Share:
        """How often the best token's id is the feature's number, mean over layers.

        Args:
            other: of the features that are compared with.

        Returns:
            The share; nan for directions, whose numbers mean nothing.
        """
        if self.site == "direction":
            return Share(*[float("nan")] * 4)
        found, model = (self.other_is_index, self.other) if other else (self.is_index, self.model)
        value = float(found.double().mean())
        return Share(value, *exact_interval(value, len(self.features)), 1 / model.d_vocab)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair of layers: layer, other_layer, features, same, same_low, same_high, same_chance,
        overlap, overlap_low, overlap_high, overlap_chance, verdict (of the best token)."""
        import pandas as pd

        rows = []
        for one in self.layers:
            for other in self.other_layers:
                same, overlap = (self.share(what, [(one, other)]) for what in ("same", "overlap"))
                numbers = [
                    number
                    for share in (same, overlap)
                    for number in (share.value, share.low, share.high, share.chance)
                ]
                rows.append((one, other, len(self.features), *numbers, same.verdict))
        columns = ["layer", "other_layer", "features"]
        columns += [
            f"{what}{end}" for what in ("same", "overlap") for end in ("", "_low", "_high", "_chance")
        ]
        return pd.DataFrame(rows, columns=[*columns, "verdict"])
