"""Results about features: what input excites one element of a block's output."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.results.base import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CompleteSearch(Result):
    """The tokens of the whole vocabulary that excite each feature most, and least."""

    site: str
    """`resid_post`, `attn_out`, `mlp_out`, `post` (the MLP's neurons), or `direction` (of `resid_post`)."""
    layers: tuple[int, ...]
    features: tuple[int, ...]
    """Elements of the activation; of `directions`, their numbers."""
    directions: Float[Tensor, "direction d_model"] | None
    """The vectors whose product with `resid_post` is the feature."""
    prefix: Int[Tensor, " prefix"]
    """Tokens before the one that is searched for, a BOS among them; empty where there are none."""
    prepend_bos: bool
    """Whether the inputs begin with BOS."""
    ids: Int[Tensor, "layer feature k"]
    """Most exciting first; of equally exciting tokens the smaller id."""
    activations: Float[Tensor, "layer feature k"]
    lowest_ids: Int[Tensor, "layer feature k"]
    """Least exciting first."""
    lowest_activations: Float[Tensor, "layer feature k"]
    strings: dict[str, str]
    """The tokens that occur, by their id."""
    vocabulary: str | None
    """What tells one tokenizer's ids from another's: a hash of its tokens; None without a tokenizer."""

    @property
    def excites(self) -> Bool[Tensor, "layer feature k"]:
        """Which of the highest tokens do excite the feature.

        A neuron (`post`) that is at 0 or below for every token has no best one: behind most activation
        functions all tokens have 0 alike there, and what comes first is the smallest id. Elsewhere nothing
        but 0 itself, which is a direction or a block of zeros, excites nothing.
        """
        return self.activations > 0 if self.site == "post" else self.activations != 0

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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GreedySearch(Result):
    """Inputs built from left to right, each token the one that excites a feature most behind those before."""

    site: str
    """As in `CompleteSearch`."""
    layer: int
    features: tuple[int, ...]
    directions: Float[Tensor, "direction d_model"] | None
    prefix: Int[Tensor, " prefix"]
    """As in `CompleteSearch`."""
    prepend_bos: bool
    aggregate: str
    """What ranks the inputs of a beam: the activation at the `last` token, or the `sum` over those found."""
    ids: Int[Tensor, "feature beam pos"]
    """The best input first."""
    activations: Float[Tensor, "feature beam pos"]
    """At each token that was found."""
    strings: dict[str, str]

    @property
    def scores(self) -> Float[Tensor, "feature beam"]:
        """What the inputs are ranked by."""
        return self.activations.sum(-1) if self.aggregate == "sum" else self.activations[..., -1]

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


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GradientSearch(Result):
    """Embeddings that gradients made excite features, and the tokens that they are nearest to."""

    site: str
    """As in `CompleteSearch`."""
    layer: int
    """Of a continuation the last, whose logits it reads."""
    directions: Float[Tensor, "direction d_model"] | None
    selected: Int[Tensor, "selected 2"]
    """(pos, feature) of every element that counts; `pos` counts the searched tokens. None for a
    continuation."""
    prefix: Int[Tensor, " prefix"]
    """As in `CompleteSearch`."""
    prepend_bos: bool
    objective: str
    """What was made small: `constant`, `maximise`, `maximin`, `l1`, `cosine` or `continuation`."""
    target_ids: Int[Tensor, " target"] | None
    constant: float | None
    prior: str
    """`none`, `softmax`, `norm` or `nearest`."""
    prior_weight: float | None
    """Of a penalty."""
    optimiser: str
    learning_rate: float
    isolated: bool
    """Whether the block was run without those before it."""
    seed: int
    objectives: Float[Tensor, "restart step"]
    """Of the embeddings, before each step and at the end; without the penalty."""
    activations: Float[Tensor, "restart step"]
    """Mean of the selected activations; nan for a continuation."""
    embeddings: Float[Tensor, "restart pos d_model"]
    """Those with the lowest sum of objective and penalty."""
    nearest_cosine: Float[Tensor, "restart pos"]
    """Of each of these to the real embedding with the largest one."""
    token_cosine: float
    """For comparison: the mean cosine of a real embedding to the nearest other one."""
    decoded_ids: dict[str, Int[Tensor, "restart pos"]]
    """By decoding, `pinv` and `nearest`: the tokens that these embeddings stand for, however good."""
    ids: dict[str, Int[Tensor, "restart pos"]]
    """By decoding: the best tokens that the embeddings stood for on their way."""
    true_objectives: dict[str, Float[Tensor, " restart"]]
    """Of running these tokens."""
    true_activations: dict[str, Float[Tensor, " restart"]]
    """Mean of the selected activations when these tokens are run; nan for a continuation."""
    selected_activations: dict[str, Float[Tensor, "restart selected"]]
    """By decoding: each of the selected activations when these tokens are run."""
    optimum: float | None
    """The largest activation of all tokens, where a complete search told it."""
    strings: dict[str, str]

    def _best(self, decoding: str | None) -> tuple[str, int]:
        ways = tuple(self.ids) if decoding is None else (decoding,)
        if not set(ways) <= set(self.ids):
            raise ValueError(f"there is no decoding {decoding!r}: there are {', '.join(self.ids)}")
        way = min(ways, key=lambda each: float(self.true_objectives[each].min()))
        return way, int(self.true_objectives[way].argmin())

    def best_ids(self, decoding: str | None = None) -> Int[Tensor, " pos"]:
        """The tokens with the lowest true objective, of one decoding or of both."""
        way, restart = self._best(decoding)
        return self.ids[way][restart]

    def best_objective(self, decoding: str | None = None) -> float:
        """The objective of running the best tokens; of a continuation, minus its log-probability (nats)."""
        way, restart = self._best(decoding)
        return float(self.true_objectives[way][restart])

    def best_activation(self, decoding: str | None = None) -> float:
        """Mean of the selected activations when the best tokens are run; nan for a continuation, of which
        `best_objective` tells."""
        way, restart = self._best(decoding)
        return float(self.true_activations[way][restart])

    def best_activations(self, decoding: str | None = None) -> Float[Tensor, " selected"]:
        """Each of the selected activations when the best tokens are run."""
        way, restart = self._best(decoding)
        return self.selected_activations[way][restart]

    @property
    def below_optimum(self) -> float | None:
        """By how much the best tokens miss the complete search's optimum; None where that is not known.

        The same token run in other company differs by a rounding, also to below 0.
        """
        return None if self.optimum is None else self.optimum - self.best_activation()

    def to_dataframe(self) -> pd.DataFrame:
        """One row per decoding and restart, the best first: decoding, restart, ids, tokens, objective,
        activation (both true), smallest_activation (of the selected ones), nearest_cosine (mean over
        positions)."""
        import pandas as pd

        rows = [
            (
                way,
                restart,
                tuple(tokens),
                "".join(self.strings[str(token)] for token in tokens),
                float(self.true_objectives[way][restart]),
                float(self.true_activations[way][restart]),
                min(self.selected_activations[way][restart].tolist(), default=float("nan")),
                float(self.nearest_cosine[restart].mean()),
            )
            for way in self.ids
            for restart, tokens in enumerate(self.ids[way].tolist())
        ]
        columns = ["decoding", "restart", "ids", "tokens", "objective", "activation"]
        columns += ["smallest_activation", "nearest_cosine"]
        table = pd.DataFrame(rows, columns=columns)
        return table.sort_values("objective", kind="stable", ignore_index=True)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureExamples(Result):
    """The windows of a corpus that excite each feature most."""

    site: str
    """As in `CompleteSearch`."""
    layers: tuple[int, ...]
    features: tuple[int, ...]
    directions: Float[Tensor, "direction d_model"] | None
    prepend_bos: bool
    """Whether windows begin with BOS, whose own activations do not count."""
    read: int
    """Windows that were read."""
    numbers: Int[Tensor, " window"]
    """Which windows of the corpus are kept, counted from 0; the others excite no feature most."""
    tokens: Int[Tensor, "window pos"]
    """Of the kept windows."""
    windows: Int[Tensor, "layer feature k"]
    """Rows of `tokens`, most exciting first; -1 where fewer windows were read."""
    positions: Int[Tensor, "layer feature k"]
    """Where in the window the feature is largest; -1 as before."""
    activations: Float[Tensor, "layer feature k pos"]
    """At every position of the window; nan at BOS, and where there is no window."""
    strings: dict[str, str]
    """The tokens that occur, by their id."""

    @property
    def peaks(self) -> Float[Tensor, "layer feature k"]:
        """The largest activation in each window; nan where there is none."""
        return self.activations.gather(-1, self.positions.clamp(min=0)[..., None])[..., 0]

    def at(self, layer: int, feature: int) -> tuple[int, int]:
        """Where a feature stands in the tensors.

        Raises:
            ValueError: it was not searched.
        """
        for name, given, known in (("layer", layer, self.layers), ("feature", feature, self.features)):
            if given not in known:
                raise ValueError(
                    f"{name} {given} was not searched: there are {', '.join(map(str, known[:20]))}"
                    + (", ..." if len(known) > 20 else "")
                )
        return self.layers.index(layer), self.features.index(feature)

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
