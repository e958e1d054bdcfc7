"""Results about features: the inputs that activate a basis dimension of an activation, or a direction."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.results.base import Result
from mechlens.results.columns import Column
from mechlens.text.display import ABSENT, visible_token

if TYPE_CHECKING:
    import pandas as pd

NO_TOKEN = ABSENT
"""Shown in place of a token if none activates the feature."""
_NOUNS = {"post": "neuron", "direction": "direction"}
_PLACES = {"direction": "resid_post", "post": "the MLP"}
_BEFORE, _AFTER = 32, 20
"""Characters of a window that are shown on either side of its largest token."""
_LAYER, _FEATURE = Column("layer"), Column("feature", help="Dimension of the activation, or direction.")
_ACTIVATION = Column("activation", digits=2, help="In the model's own units.")


def feature_noun(site: str) -> str:
    """What one element of an activation is called: `feature`, `neuron` or `direction`."""
    return _NOUNS.get(site, "feature")


def place_words(site: str, layer: int | None = None) -> str:
    """Where features are read: `resid_post of layer 2`, `the MLP`."""
    name = _PLACES.get(site, site)
    return name if layer is None else f"{name} of layer {layer}"


def listed(values: Iterable[int], most: int = 20) -> str:
    """Numbers as text; only the first `most` of them."""
    every = list(values)
    return ", ".join(map(str, every[:most])) + (", ..." if len(every) > most else "")


class OfFeatures(Result):
    """What results about features share."""

    if TYPE_CHECKING:
        site: str
        strings: dict[str, str]
        prefix: Int[Tensor, " prefix"]

    @property
    def noun(self) -> str:
        """What one element of the activation is called."""
        return feature_noun(self.site)

    @property
    def begins(self) -> str:
        """What inputs begin with: `after <s>`, or `without BOS`."""
        return f"after {self.text(self.prefix)}" if len(self.prefix) else "without BOS"

    def text(self, ids: Int[Tensor, " pos"] | Sequence[int], between: str = "") -> str:
        """Tokens as one text in which nothing is invisible.

        Args:
            between: a space separates tokens that a search put together; spaces within tokens are dots.
        """
        every = ids.tolist() if isinstance(ids, Tensor) else ids
        return between.join(visible_token(self.strings[str(token)]) for token in every)

    def column(self, name: str) -> Column:
        found = super().column(name)
        return dataclasses.replace(found, title=self.noun) if name == "feature" else found


def _place(name: str, given: int, known: Sequence[int]) -> int:
    if given not in known:
        raise ValueError(f"{name} {given} was not searched: the search covers {listed(known)}")
    return known.index(given)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ExhaustiveSearch(OfFeatures):
    """The maximally and minimally activating tokens of each feature, among the whole vocabulary."""

    site: str
    """`resid_post`, `attn_out`, `mlp_out`, `post` (the MLP's neurons), or `direction` (in `resid_post`)."""
    layers: tuple[int, ...]
    features: tuple[int, ...]
    """Dimensions of the activation, or rows of `directions`."""
    directions: Float[Tensor, "direction d_model"] | None
    """The vectors whose dot product with `resid_post` is the feature."""
    prefix: Int[Tensor, " prefix"]
    """Tokens before the searched one, including BOS; empty if there are none."""
    prepend_bos: bool
    """Whether inputs begin with BOS."""
    ids: Int[Tensor, "layer feature k"]
    """Most activating token first; ties go to the smaller id."""
    activations: Float[Tensor, "layer feature k"]
    lowest_ids: Int[Tensor, "layer feature k"]
    """Least activating token first."""
    lowest_activations: Float[Tensor, "layer feature k"]
    strings: dict[str, str]
    """The text of every token that occurs, keyed by its id as a string."""
    vocabulary: str | None
    """Hash of the tokenizer's tokens, to tell tokenizers apart; None without a tokenizer."""

    columns: ClassVar = (
        _LAYER,
        _FEATURE,
        Column("rank"),
        Column("highest", help="The maximally activating token."),
        _ACTIVATION,
        Column("lowest", help="The minimally activating token."),
        Column("lowest_activation", "activation", digits=2),
    )

    @property
    def title(self) -> str:
        return f"Maximally activating tokens of {self.noun}s of {place_words(self.site)} in {self.model.name}"

    @property
    def activates(self) -> Bool[Tensor, "layer feature k"]:
        """Which of the highest tokens activate the feature.

        A neuron (`post`) that is at most 0 for every token has no best token: with most activation functions,
        all tokens tie at 0 and the smallest id comes first. At other sites only exactly 0, as from a
        direction or block of zeros, counts as not activated.
        """
        return self.activations > 0 if self.site == "post" else self.activations != 0

    def at(self, layer: int, feature: int) -> tuple[int, int]:
        """Indices of a feature in the tensors.

        Raises:
            ValueError: it was not searched.
        """
        return _place("layer", layer, self.layers), _place(self.noun, feature, self.features)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer, feature, end and rank: layer, feature, end (`highest`, `lowest`), rank (from
        1), id, token, activation."""
        import pandas as pd

        ends = (
            ("highest", self.ids.tolist(), self.activations.tolist()),
            ("lowest", self.lowest_ids.tolist(), self.lowest_activations.tolist()),
        )
        rows = [
            (layer, feature, end, rank + 1, token, self.strings[str(token)], activations[i][j][rank])
            for i, layer in enumerate(self.layers)
            for j, feature in enumerate(self.features)
            for end, ids, activations in ends
            for rank, token in enumerate(ids[i][j])
        ]
        columns = ["layer", "feature", "end", "rank", "id", "token", "activation"]
        return pd.DataFrame(rows, columns=columns)

    def summary(
        self, top: int = 10, *, layers: Sequence[int] | None = None, features: Sequence[int] | None = None
    ) -> pd.DataFrame:
        """The tokens at both ends, whitespace visible, one row per layer, feature and rank; at most `top`.

        Args:
            layers: the layers to show; None shows all.
            features: the features to show; None shows all.

        Raises:
            ValueError: one of them was not searched.
        """
        import pandas as pd

        rows: list[tuple[Any, ...]] = []
        for layer in self.layers if layers is None else layers:
            for feature in self.features if features is None else features:
                i, j = self.at(layer, feature)
                for k, (token, lowest) in enumerate(
                    zip(self.ids[i, j].tolist(), self.lowest_ids[i, j].tolist(), strict=True)
                ):
                    highest = self.text([token]) if self.activates[i, j, k] else NO_TOKEN
                    values = self.activations[i, j, k].item(), self.lowest_activations[i, j, k].item()
                    rows.append((layer, feature, k + 1, highest, values[0], self.text([lowest]), values[1]))
        return pd.DataFrame(rows[:top], columns=[each.name for each in self.columns])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GreedySearch(OfFeatures):
    """Inputs built from left to right, each token the most activating one given those before it."""

    site: str
    """As in `ExhaustiveSearch`."""
    layer: int
    features: tuple[int, ...]
    directions: Float[Tensor, "direction d_model"] | None
    prefix: Int[Tensor, " prefix"]
    """As in `ExhaustiveSearch`."""
    prepend_bos: bool
    aggregate: str
    """What inputs are ranked by: the activation at the `last` token, or the `sum` over the found tokens."""
    ids: Int[Tensor, "feature beam pos"]
    """Best input first."""
    activations: Float[Tensor, "feature beam pos"]
    """At each found token."""
    strings: dict[str, str]

    columns: ClassVar = (
        _LAYER,
        _FEATURE,
        Column("rank"),
        Column("input", help="Tokens are separated by spaces; spaces within tokens are dots."),
        Column("activations", "activation at each token"),
        Column("score", digits=2),
    )

    @property
    def title(self) -> str:
        return f"Greedy search for {self.noun}s of {place_words(self.site, self.layer)} in {self.model.name}"

    @property
    def scores(self) -> Float[Tensor, "feature beam"]:
        """What the inputs are ranked by."""
        return self.activations.sum(-1) if self.aggregate == "sum" else self.activations[..., -1]

    @property
    def ranked_by(self) -> str:
        """The same in words."""
        return "sum of the activations" if self.aggregate == "sum" else "activation at the last token"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per feature, input and token: layer, feature, rank (of the input, from 1), pos, id, token,
        activation."""
        import pandas as pd

        rows = [
            (self.layer, feature, rank + 1, pos, token, self.strings[str(token)], activation)
            for feature, inputs, values in zip(
                self.features, self.ids.tolist(), self.activations.tolist(), strict=True
            )
            for rank, (ids, numbers) in enumerate(zip(inputs, values, strict=True))
            for pos, (token, activation) in enumerate(zip(ids, numbers, strict=True))
        ]
        return pd.DataFrame(rows, columns=["layer", "feature", "rank", "pos", "id", "token", "activation"])

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The inputs, with whitespace visible, one row per feature and rank; at most `top` rows."""
        import pandas as pd

        rows = [
            (
                self.layer,
                feature,
                rank + 1,
                self.text(self.ids[i, rank], " "),
                " ".join(map(_ACTIVATION.text, self.activations[i, rank].tolist())),
                float(self.scores[i, rank]),
            )
            for i, feature in enumerate(self.features)
            for rank in range(self.ids.shape[1])
        ]
        return pd.DataFrame(rows[:top], columns=[each.name for each in self.columns])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureExamples(OfFeatures):
    """The maximally activating examples of each feature: windows of a corpus."""

    site: str
    """As in `ExhaustiveSearch`."""
    layers: tuple[int, ...]
    features: tuple[int, ...]
    directions: Float[Tensor, "direction d_model"] | None
    prepend_bos: bool
    """Whether windows begin with BOS, whose own activations do not count."""
    read: int
    """How many windows were read."""
    numbers: Int[Tensor, " window"]
    """Indices in the corpus, from 0, of the windows that are kept."""
    tokens: Int[Tensor, "window pos"]
    """The kept windows."""
    windows: Int[Tensor, "layer feature k"]
    """Rows of `tokens`, most activating first; -1 where fewer windows were read."""
    positions: Int[Tensor, "layer feature k"]
    """Where in the window the feature is largest; -1 as in `windows`."""
    activations: Float[Tensor, "layer feature k pos"]
    """At every position of the window; nan at BOS, and where there is no window."""
    strings: dict[str, str]
    """The text of every token that occurs, keyed by its id as a string."""

    columns: ClassVar = (
        _LAYER,
        _FEATURE,
        Column("rank"),
        Column("window", help="Index of the window in the corpus, from 0."),
        Column("pos", "position"),
        _ACTIVATION,
        Column("context", help="The text around the «token» with the largest activation."),
    )

    @property
    def title(self) -> str:
        return (
            f"Maximally activating examples of {self.noun}s of {place_words(self.site)} in {self.model.name}"
        )

    @property
    def peaks(self) -> Float[Tensor, "layer feature k"]:
        """The largest activation in each window; nan if there is no window."""
        return self.activations.gather(-1, self.positions.clamp(min=0)[..., None])[..., 0]

    def at(self, layer: int, feature: int) -> tuple[int, int]:
        """Indices of a feature in the tensors.

        Raises:
            ValueError: it was not searched.
        """
        return _place("layer", layer, self.layers), _place(self.noun, feature, self.features)

    def context(self, window: int, pos: int) -> str:
        """The text of a kept window around a «token». Spaces are kept; line breaks are made visible."""
        tokens = [self.strings[str(token)] for token in self.tokens[window].tolist()]
        before, after = _readable("".join(tokens[:pos])), _readable("".join(tokens[pos + 1 :]))
        before = f"…{before[-_BEFORE:]}" if len(before) > _BEFORE else before
        after = f"{after[:_AFTER]}…" if len(after) > _AFTER else after
        return f"{before}«{visible_token(tokens[pos])}»{after}"

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The text around the largest activation of each window; at most `top` rows."""
        table = self.to_dataframe().head(top)
        rows = {int(number): row for row, number in enumerate(self.numbers)}
        places = zip(table["window"], table["pos"], strict=True)
        table["context"] = [self.context(rows[window], pos) for window, pos in places]
        return table[[each.name for each in self.columns]]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer, feature and window: layer, feature, rank (from 1), window (of the corpus), pos,
        id, token (where the feature is largest), activation, text (of the window)."""
        import pandas as pd

        texts = ["".join(self.strings[str(token)] for token in ids) for ids in self.tokens.tolist()]
        peaks, rows = self.peaks.tolist(), []
        for i, layer in enumerate(self.layers):
            for j, feature in enumerate(self.features):
                found = zip(self.windows[i, j].tolist(), self.positions[i, j].tolist(), strict=True)
                for rank, (window, pos) in enumerate(found):
                    if window < 0:
                        continue
                    token = int(self.tokens[window, pos])
                    about = (token, self.strings[str(token)], peaks[i][j][rank], texts[window])
                    rows.append((layer, feature, rank + 1, int(self.numbers[window]), pos, *about))
        columns = ["layer", "feature", "rank", "window", "pos", "id", "token", "activation", "text"]
        return pd.DataFrame(rows, columns=columns)


def _readable(text: str) -> str:
    """A text with line breaks and the like made visible, but not spaces."""
    return " ".join(visible_token(part) if part else "" for part in text.split(" "))
