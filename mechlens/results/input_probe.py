"""The result of reading the input back out of the residual stream."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.results.base import Result, row_place

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InputProbe(Result):
    """Linear maps from each layer's residual stream back to the token that was read.

    Dictionaries are keyed by basis: `embedding`, the coordinates of `W_E` themselves, then those asked for.
    What a map recovers has the axes `[map, row]`, what it is like the axis `fit`.
    """

    rows: tuple[str, ...]
    """`embed` (block 0's `resid_pre`), then the layers by number (their `resid_post`)."""
    maps: tuple[str, ...]
    """How a row is read: `per_layer`, by a map of its own; `shared`, by one fitted to all rows together."""
    accuracy: dict[str, Float[Tensor, "map row"]]
    """Share of held-out positions whose token is the one nearest to what the map makes of the stream, in
    [0, 1]; a token that ties for the nearest counts."""
    accuracy_interval: dict[str, Float[Tensor, "map row 2"]]
    """95% bootstrap interval of the mean over held-out windows; nan where there is only one."""
    chance: float
    """Held-out accuracy of always naming the token that is most frequent in the training windows."""
    r2: dict[str, Float[Tensor, "map row"]]
    """Share of the held-out variance of the token's coefficients that is reconstructed, at most 1."""
    element_r2: dict[str, Float[Tensor, "map row _"]]
    """The same for each element; nan where a coefficient does not vary."""
    fits: tuple[str, ...]
    """The maps by name: the rows (where there are maps per layer), then `shared`."""
    weights: dict[str, Float[Tensor, "fit d_model _"]]
    """The maps: `stream @ weights[basis][fit] + biases[basis][fit]` are the coefficients of the token."""
    biases: dict[str, Float[Tensor, "fit _"]]
    similarity: dict[str, Float[Tensor, " fit"]]
    """Cosine of the map, read as logits, with the embedding matrix, in [-1, 1]: see `probe_input`."""
    similarity_null: dict[str, Float[Tensor, "fit 3"]]
    """The same for random maps with the same singular values: mean, and the ends of the central 95%."""
    unembedding_similarity: dict[str, Float[Tensor, " fit"]]
    """The cosine with the unembedding; nan where that has another vocabulary."""
    unembedding_similarity_null: dict[str, Float[Tensor, "fit 3"]]
    directions: dict[str, Float[Tensor, "_ d_model"]]
    """Each element as a unit vector of the embedding space; 0 for an element that is nowhere used."""
    importance: dict[str, Float[Tensor, " _"]]
    """Share of each element in the embedding matrix: of its variance (`embedding`, `pca`) or of the squared
    norms of the parts (`nmf`). `pca` and `nmf` are in decreasing order."""
    explained: dict[str, float]
    """How much of `W_E` a basis holds: of its variance, or for `nmf` of its squared norm."""
    weight: dict[str, Float[Tensor, "fit _"]]
    """Where in the stream the map to the embedding reads: share of each element, see `probe_input`."""
    weight_correlation: dict[str, Float[Tensor, " fit"]]
    """Spearman's rank correlation of weight and importance, in [-1, 1]: negative where the map leans on what
    the embedding cares little about. nan where either does not vary."""
    weight_correlation_null: dict[str, Float[Tensor, "fit 3"]]
    """Of the same random maps on the same stream."""
    nmf_converged: bool | None
    """Whether the factorisation met its tolerance; None without the basis `nmf`."""
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

    def fit_of(self, name: str, row: str) -> int:
        """Place on the axis `fit` of the map that reads a row in a way of `maps`."""
        return self.fits.index("shared" if name == "shared" else row)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per basis, kind of map, row and layer (-1 for `embed`): accuracy with its interval and
        chance, r2, and of the map that reads the row both similarities and the correlation of weight and
        importance with their nulls."""
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

    def elements_to_dataframe(self) -> pd.DataFrame:
        """One row per basis, kind of map, row, layer (-1 for `embed`) and element: importance, weight, r2."""
        import pandas as pd

        tables = []
        for basis, importance in self.importance.items():
            index = pd.MultiIndex.from_product(
                [[basis], self.maps, self.rows, range(len(importance))],
                names=["basis", "kind", "row", "element"],
            )
            r2 = self.element_r2[basis]
            order = [[self.fit_of(name, row) for row in self.rows] for name in self.maps]
            weight = self.weight[basis][torch.tensor(order)]
            columns = {"importance": importance.expand_as(weight), "weight": weight, "r2": r2}
            flat = {name: values.flatten().numpy() for name, values in columns.items()}
            tables.append(pd.DataFrame(flat, index=index).reset_index())
        table = pd.concat(tables, ignore_index=True)
        table.insert(3, "layer", [row_place(row)[0] for row in table["row"]])
        return table
