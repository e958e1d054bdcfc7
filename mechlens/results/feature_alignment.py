"""Whether features with the same number have the same best tokens in two layers or models."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.errors import ArgumentError
from mechlens.measures.statistics import exact_interval
from mechlens.results.base import ModelInfo, Result
from mechlens.results.columns import Column
from mechlens.text.display import number

if TYPE_CHECKING:
    import pandas as pd

ALIGNED, MORE, CHANCE = "aligned", "more than chance", "no more than chance"
SHARES = {"same": "the same best token", "overlap": "the same best tokens"}
_SHARE_COLUMNS = (("same", "the same best token"), ("overlap", "shared best tokens"))


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of the features, with its 95% interval and what chance gives."""

    value: float
    low: float
    """Lower end of the 95% interval."""
    high: float
    chance: float

    @property
    def verdict(self) -> str:
        """`aligned` if the whole interval is above chance, otherwise `no more than chance`; empty if
        the share is undefined."""
        if not (self.low == self.low and self.chance == self.chance):
            return ""
        return ALIGNED if self.low > self.chance else CHANCE

    @property
    def index_verdict(self) -> str:
        """The verdict on `index_share`, for which more than chance does not mean alignment."""
        return MORE if self.low > self.chance else CHANCE

    @property
    def chance_text(self) -> str:
        """Chance with enough digits: in a large vocabulary it is almost 0."""
        if math.isnan(self.chance):
            return ""
        return f"{self.chance:.2g}" if 0 < self.chance < 0.001 else number(self.chance)

    @property
    def text(self) -> str:
        """The share with its interval: `0.166 (0.120 to 0.225)`."""
        if math.isnan(self.value):
            return "nothing to compare"
        return f"{number(self.value)} ({number(self.low)} to {number(self.high)})"

    def __str__(self) -> str:
        """In words: `0.166 (0.120 to 0.225); chance 0.0096`."""
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f}); chance {self.chance:.4f}"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureAlignment(Result):
    """How often features with the same number have the same best tokens in two layers, compared with chance.

    A feature that no token activates, such as a neuron at 0 for all tokens, has no best token. It is left out
    of the shares and of chance for every pair of layers in which it has none.
    """

    other: ModelInfo
    """The model of the other search; `model` itself if layers of one search are compared."""
    within: bool
    """Whether layers of the same search are compared."""
    site: str
    other_site: str
    layers: tuple[int, ...]
    other_layers: tuple[int, ...]
    features: tuple[int, ...]
    """The features in both searches."""
    top_k: int
    """How many of the best tokens the overlap counts."""
    prefix: Int[Tensor, " prefix"]
    other_prefix: Int[Tensor, " other_prefix"]
    activated: Bool[Tensor, "layer feature"]
    """Whether any token activates the feature."""
    other_activated: Bool[Tensor, "other_layer feature"]
    same: Bool[Tensor, "layer other_layer feature"]
    """Whether the best token is the same; False if either has none."""
    overlap: Float[Tensor, "layer other_layer feature"]
    """Share of the `top_k` best tokens that are the same, in any order, in [0, 1]; nan if either has none.
    Tokens that do not activate the feature do not count, so a list may be shorter than `top_k`."""
    chance_same: Float[Tensor, "layer other_layer"]
    """How often two features with different numbers have the same best token; nan for one feature."""
    chance_overlap: Float[Tensor, "layer other_layer"]
    """Mean overlap of two features with different numbers; nan for one feature."""
    is_index: Bool[Tensor, "layer feature"]
    """Whether the best token's id is the feature's number, which suggests an artifact of decoding; False if
    there is no best token."""
    other_is_index: Bool[Tensor, "other_layer feature"]

    columns: ClassVar = (
        Column("layer"),
        Column("other_layer", "with layer"),
        Column("features", help="Number of features that some token activates in both layers."),
        *(
            Column(f"{what}{end}", f"{title}{words}")
            for what, title in _SHARE_COLUMNS
            for end, words in (("", ""), ("_low", ", low"), ("_high", ", high"), ("_chance", ", chance"))
        ),
        Column("verdict"),
    )

    @property
    def title(self) -> str:
        return f"Alignment of {self.sites} features of {self.models}"

    @property
    def sites(self) -> str:
        """Where features are read: `mlp_out`, or `attn_out with mlp_out`."""
        return self.site if self.site == self.other_site else f"{self.site} with {self.other_site}"

    @property
    def one_model(self) -> bool:
        """Whether both sides are the same model, as far as the metadata tells."""
        return self.within or (self.model.name == self.other.name and self.site != self.other_site)

    @property
    def models(self) -> str:
        """Whose features are compared: `gpt2`, or `gpt2 with gpt2-medium`."""
        here, there = self.model.name, self.other.name
        if self.one_model:
            return here
        return f"{here} with {there}" if here != there else f"{here} with another {there}"

    def to_json(self) -> dict[str, Any]:
        """The arguments, the shares over all pairs of layers with their verdicts, and the pairs as rows."""
        shares = {what: self.share(what) for what in SHARES}
        found = {what: dataclasses.asdict(each) | {"verdict": each.verdict} for what, each in shares.items()}
        index = self.index_share()
        found["is_index"] = dataclasses.asdict(index) | {"verdict": index.index_verdict}
        return super().to_json() | {"shares": found}

    @property
    def compared(self) -> Bool[Tensor, "layer other_layer feature"]:
        """Which features count for a pair of layers: those that some token activates in both."""
        return self.activated[:, None] & self.other_activated

    def pairs(self) -> list[tuple[int, int]]:
        """The pairs of layers that `share` averages over.

        Within one search, each layer is paired with each later one. Otherwise each layer is paired with the
        same layer of the other search or, if no layer is in both, with all of its layers.
        """
        if self.within:
            return [(one, other) for one in self.layers for other in self.other_layers if one < other]
        common = [(layer, layer) for layer in self.layers if layer in self.other_layers]
        return common or [(one, other) for one in self.layers for other in self.other_layers]

    def share(self, what: str = "same", pairs: list[tuple[int, int]] | None = None) -> Share:
        """A share of the features that count, averaged over pairs of layers.

        The interval is the Clopper-Pearson interval with one observation per feature; averaging over pairs
        could only narrow it. If features are left out, the number of observations is the harmonic mean of
        how many count. Pairs with fewer than two features have no chance level and are left out if others
        have more.

        Args:
            what: `same` (the best token) or `overlap` (of the `top_k` best).
            pairs: (layer, other layer); None takes `pairs()`.

        Raises:
            ValueError: an unknown share, or a layer that was not compared.
        """
        if what not in SHARES:
            raise ArgumentError("what", f"one of {', '.join(SHARES)}", what)
        pairs = self.pairs() if pairs is None else pairs
        for one, other in pairs:
            if one not in self.layers or other not in self.other_layers:
                raise ValueError(
                    f"layers {one} and {other} were not compared: the layers are {self.layers} and "
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
        """How often the best token's id is the feature's number, averaged over layers.

        Args:
            other: whether to use the other search.

        Returns:
            The share of features that have a best token; nan for directions, whose numbers mean nothing.
        """
        if self.site == "direction":
            return Share(*[float("nan")] * 4)
        found, counted, model = (
            (self.other_is_index, self.other_activated, self.other)
            if other
            else (self.is_index, self.activated, self.model)
        )
        some = counted.any(-1)
        return _mean_share(found[some], counted[some], 1 / model.d_vocab)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair of layers: layer, other_layer, features (that count), same, same_low, same_high,
        same_chance, overlap, overlap_low, overlap_high, overlap_chance, verdict (on the best token).

        Within one search, each layer is paired with each later one; otherwise, with every layer of the other.
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
    """The mean over rows of the mean over the features that count; each row has at least one."""
    if not len(values):
        return Share(*[float("nan")] * 4)
    n = counted.sum(-1)
    value = float((torch.where(counted, values.double(), 0.0).sum(-1) / n).mean())
    # A mean's standard deviation is at most the mean of its rows' standard deviations. By Cauchy-Schwarz,
    # that is at most the standard deviation of the mean share with the harmonic mean of the observations,
    # which rounding may move off an integer.
    low, high = exact_interval(value, int(statistics.harmonic_mean(n.tolist()) + 1e-6))
    return Share(value, low, high, chance)


# -- several comparisons together --


def index_shares(results: Iterable[FeatureAlignment]) -> dict[str, Share]:
    """How often a best token's id is the feature's number, by model (and site), each once.

    Directions are left out, because their numbers mean nothing.
    """
    shares = {name: result.index_share(other) for name, (result, other) in _sides(results).items()}
    return {name: share for name, share in shares.items() if share.value == share.value}


def left_out(results: Iterable[FeatureAlignment]) -> dict[str, list[int]]:
    """How many features no token activates, per layer, by model (and site), if there are any."""
    counts = {
        name: (~(result.other_activated if other else result.activated)).sum(-1).tolist()
        for name, (result, other) in _sides(results).items()
    }
    return {name: layers for name, layers in counts.items() if any(layers)}


def left_out_words(results: Sequence[FeatureAlignment]) -> str:
    """`left_out` as a sentence; empty if none are left out."""
    sides, counts = _sides(results), []
    for name, layers in left_out(results).items():
        fewest, most = min(layers), max(layers)
        n = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
        features = len(sides[name][0].features)
        counts.append(f"{n} of {features:,} in {'each' if fewest == most else 'a'} layer of {name}")
    if not counts:
        return ""
    return f"Features that no token activates have no best token and are left out: {'; '.join(counts)}."


def contrast_words(results: Sequence[FeatureAlignment], names: Sequence[str]) -> str:
    """How often layers agree in the first search and in each other one; empty with fewer than two."""
    known = [
        (name.removeprefix("layers, "), share)
        for name, result in zip(names, results, strict=True)
        if result.within and not math.isnan((share := result.share()).value)
    ]
    if len(known) < 2:
        return ""
    (name, first), *others = known
    listed = [
        f"{other} {each.value:.3f} (the intervals "
        f"{'overlap' if each.low <= first.high and first.low <= each.high else 'do not overlap'})"
        for other, each in others
    ]
    return f"Layers have the same best token: {name} {first.value:.3f}, {', '.join(listed)}."


def result_names(results: Sequence[FeatureAlignment], names: Sequence[str] | None) -> list[str]:
    """The name of each comparison: the given names or the models', with the sites where these differ.

    Raises:
        ValueError: no results, or a different number of names.
    """
    if not results:
        raise ValueError("nothing to show: give at least one result of feature_alignment")
    if names is None:
        names = [result.models for result in results]
    if isinstance(names, str) or len(names) != len(results):
        raise ArgumentError("names", f"{len(results)} texts, one for each result", names)
    several = len({result.sites for result in results}) > 1
    return [
        f"{name}, {result.sites}"
        if (several or " with " in result.sites) and not re.search(rf"\b{result.sites}\b", name)
        else name
        for name, result in zip(names, results, strict=True)
    ]


def _sides(results: Iterable[FeatureAlignment]) -> dict[str, tuple[FeatureAlignment, bool]]:
    """By model (and site), each once: a result with these features, and whether as its other search."""
    results = list(results)
    several = len({site for each in results for site in (each.site, each.other_site)}) > 1
    found: dict[str, tuple[FeatureAlignment, bool]] = {}
    for result in results:
        sides = [(result.model.name, result.site, False)]
        if not result.within:
            # the same name may come from another directory
            alike = (result.other, result.other_site) == (result.model, result.site)
            name = f"the other {result.other.name}" if alike else result.other.name
            sides.append((name, result.other_site, True))
        for name, site, other in sides:
            found.setdefault(f"{name}, {site}" if several else name, (result, other))
    return found
