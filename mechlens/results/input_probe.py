"""Linear maps that recover the input token from the residual stream."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from mechlens.results.base import Result, row_place
from mechlens.results.columns import Column

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InputProbe(Result):
    """Linear maps from each layer's residual stream back to the token at the position.

    Dictionaries are keyed by basis: `embedding` (the coordinates of `W_E` themselves), `pca`, `nmf`. Measures
    of what a map recovers have axes `[map, row]`; properties of the map itself have the axis `fit`.

    Nulls are the same measure for random maps `U diag(s) V.T`, with the map's singular values s and uniformly
    random orthogonal U and V: the mean, and the ends of the central 95%.
    """

    rows: tuple[str, ...]
    """`embed` (block 0's `resid_pre`), then the layers by number (their `resid_post`)."""
    maps: tuple[str, ...]
    """`per_layer` (a map for each row) and `shared` (one map fitted to all rows together)."""
    accuracy: dict[str, Float[Tensor, "map row"]]
    """Share of held-out positions whose token is nearest to the map's output, in [0, 1]; ties count."""
    accuracy_interval: dict[str, Float[Tensor, "map row 2"]]
    """95% bootstrap interval of the mean over held-out windows; nan if there is only one."""
    chance: float
    """Held-out accuracy of always naming the most frequent token of the training windows."""
    r2: dict[str, Float[Tensor, "map row"]]
    """Share of the held-out variance of the token's coefficients that is explained, at most 1."""
    element_r2: dict[str, Float[Tensor, "map row _"]]
    """The same for each element; nan if a coefficient does not vary."""
    fits: tuple[str, ...]
    """The maps by name: the rows (if there are maps per layer), then `shared`."""
    weights: dict[str, Float[Tensor, "fit d_model _"]]
    """`stream @ weights[basis][fit] + biases[basis][fit]` estimates the coefficients of the token."""
    biases: dict[str, Float[Tensor, "fit _"]]
    similarity: dict[str, Float[Tensor, " fit"]]
    """Cosine (Frobenius) of the map read as logits, `M @ C.T`, with `W_E.T`, in [-1, 1]. C has the
    coefficients of all tokens. Both are centered over the vocabulary, which only shifts all logits alike."""
    similarity_null: dict[str, Float[Tensor, "fit 3"]]
    unembedding_similarity: dict[str, Float[Tensor, " fit"]]
    """The cosine with `W_U` (with the final norm's scale folded in); nan if it has another vocabulary."""
    unembedding_similarity_null: dict[str, Float[Tensor, "fit 3"]]
    directions: dict[str, Float[Tensor, "_ d_model"]]
    """Each element as a unit vector of the embedding space; 0 for an element that no token uses."""
    importance: dict[str, Float[Tensor, " _"]]
    """Share of each element in `W_E`: of its variance (`embedding`, `pca`) or of the squared norms of the
    parts (`nmf`). `pca` and `nmf` are in decreasing order."""
    explained: dict[str, float]
    """Share of `W_E` that a basis explains: of its variance, or for `nmf` of its squared norm."""
    weight: dict[str, Float[Tensor, "fit _"]]
    """How much the map to the embedding reads from each element of the stream x: `var(x . g) |g M|^2` for the
    element's unit direction g, as a share of the sum over elements."""
    weight_correlation: dict[str, Float[Tensor, " fit"]]
    """Spearman rank correlation of weight and importance, in [-1, 1]: negative if the map relies on
    directions that matter little in the embedding. nan if either does not vary."""
    weight_correlation_null: dict[str, Float[Tensor, "fit 3"]]
    """For the same residual stream."""
    nmf_converged: bool | None
    """Whether the factorization met its tolerance; None without the basis `nmf`."""
    train_tokens: int
    """Positions that the maps were fitted to."""
    held_out_tokens: int
    length: int
    """Tokens in a window."""
    ridge: float
    null_draws: int
    """Random maps in each null."""
    seed: int
    prepend_bos: bool

    columns: ClassVar = (
        Column("basis", help="Coordinates of `W_E` (embedding), principal axes, or non-negative factors."),
        Column("kind", "map"),
        Column("row"),
        Column("accuracy", help="Share of held-out positions whose token is nearest to the map's output."),
        Column("chance", help="Accuracy of always naming the most frequent token."),
        Column("r2", "R²", help="Share of the held-out variance that the map explains."),
        Column("similarity", "cosine with W_E", signed=True),
        Column("unembedding_similarity", "cosine with W_U", signed=True),
        Column(
            "weight_correlation",
            "weight against importance",
            signed=True,
            help="Rank correlation of how much the map reads each direction and its share of the embedding.",
        ),
    )

    def summary(self, top: int = 10) -> pd.DataFrame:
        """Every row of the stream in the coordinates of the embedding, last layer first, at most `top`."""
        table = self.to_dataframe()
        own = table[(table["basis"] == "embedding") & (table["kind"] == self.maps[0])]
        return own[[each.name for each in self.columns]][::-1].head(top)

    def fit_of(self, name: str, row: str) -> int:
        """Index of a row's map on the axis `fit`: the row's own map, or the `shared` one."""
        return self.fits.index("shared" if name == "shared" else row)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per basis, kind of map and row, with its layer (-1 for `embed`): accuracy with its interval
        and chance, r2, and, for the row's map, both similarities and the correlation of weight and
        importance, each with its null."""
        import pandas as pd

        records: list[dict[str, Any]] = []
        for basis, accuracy in self.accuracy.items():
            for m, name in enumerate(self.maps):
                for r, row in enumerate(self.rows):
                    low, high = self.accuracy_interval[basis][m, r].tolist()
                    record: dict[str, Any] = {
                        "basis": basis,
                        "kind": name,
                        "row": row,
                        "layer": row_place(row)[0],
                        "accuracy": float(accuracy[m, r]),
                        "accuracy_low": low,
                        "accuracy_high": high,
                        "chance": self.chance,
                        "r2": float(self.r2[basis][m, r]),
                    }
                    fit = self.fit_of(name, row)
                    for measure in ("similarity", "unembedding_similarity", "weight_correlation"):
                        null = getattr(self, f"{measure}_null")[basis][fit].tolist()
                        record[measure] = float(getattr(self, measure)[basis][fit])
                        for end, value in zip(("", "_low", "_high"), null, strict=True):
                            record[f"{measure}_null{end}"] = value
                    records.append(record)
        return pd.DataFrame(records)
