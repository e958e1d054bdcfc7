"""Results about features: what input excites one element of a block's output."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
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
