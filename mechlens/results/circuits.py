"""Results about circuits: products of a model's weights, kept as their two thin factors."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.results.base import Result
from mechlens.results.heads import head_label

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Circuit(Result):
    """A product of weights `A @ B`, of which only the thin factors exist.

    A row belongs to the first of `axes`, a column to the second: entry (i, j) of a circuit with the axes
    `query` and `key` is what query i gives to key j, and with `source` and `destination` what source i
    writes to destination j. Nothing has to be transposed.
    """

    A: Float[Tensor, "row inner"]
    B: Float[Tensor, "inner column"]
    axes: tuple[str, str]
    """(`query`, `key`) or (`source`, `destination`)."""
    spaces: tuple[str, str]
    """What numbers the rows and the columns: `tokens`, `d_model` or `positions`."""
    name: str
    """Such as `full OV of L5H5`."""
    heads: tuple[tuple[int, int], ...]
    """(layer, head) of every head whose weights are in it, the earliest first; of a sum, its terms."""
    embedding: str
    """How tokens come in: `W_E`, or `effective`, which is `W_E` and the first MLP of it; `none` where no
    axis is of tokens."""
    rotary: str
    """What became of the rotation of queries and keys: `none` where the model or the circuit has none to
    do with; `relative` where they are rotated `relative_position` apart; `unrotated` where only the
    dimensions that are never rotated are in it."""
    relative_position: int | None
    """How many tokens the key comes before the query, of a rotary model."""
    normalized_positions: bool
    """Whether each position's vector was divided by its own scale."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.A.shape[0], self.B.shape[1]

    @property
    def is_zero(self) -> bool:
        """Whether a factor is all zeros, as that of a head that was cut out of its model: all entries tie
        then, and how often a token finds itself is undefined."""
        return not bool(self.A.any() and self.B.any())

    @property
    def matrix(self) -> Any:
        """The same as TransformerLens's `FactoredMatrix`; its `.AB` builds the whole matrix."""
        from transformer_lens import FactoredMatrix

        return FactoredMatrix(self.A, self.B)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per singular value, the largest first: index, singular_value, share.

        `share` is of the sum of squares of all entries. The entries themselves are read with
        `largest_pairs` and `circuit_corner`: there are too many for a table.
        """
        import pandas as pd

        small = torch.linalg.qr(self.A).R @ torch.linalg.qr(self.B.T).R.T
        values = torch.linalg.svdvals(small)
        share = values.square() / values.square().sum()
        return pd.DataFrame(
            {"index": range(len(values)), "singular_value": values.cpu(), "share": share.cpu()}
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CompositionScores(Result):
    """How much of what each head reads could come from each earlier head, by their weights alone."""

    kind: str
    """`q`, `k` or `v`: through which of the later head's inputs."""
    scores: Float[Tensor, "layer head layer head"]
    """`[earlier layer, head, later layer, head]`, in [0, 1]; nan unless the one layer is before the other,
    and where a head's weights are all zero."""
    baseline_mean: float
    """Mean score of heads of the same sizes with random weights."""
    baseline_std: float
    """Standard deviation of one such score."""
    baseline_draws: int
    seed: int
    """Of the random weights."""
    rotary: str
    """As in `Circuit`; `ignored` where a rotary model's `W_Q @ W_K.T` was taken without its rotation, as
    TransformerLens does."""
    relative_position: int | None

    @property
    def over_baseline(self) -> Float[Tensor, "layer head layer head"]:
        """Scores less the baseline's mean: around 0 for heads that have nothing to do with each other."""
        return self.scores - self.baseline_mean

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair of an earlier and a later head, the highest score first: earlier, later (such as
        `L4H11`), earlier_layer, earlier_head, later_layer, later_head, kind, score, over_baseline, z.

        `z` is `over_baseline` in standard deviations of the baseline.
        """
        import pandas as pd

        n_layers, n_heads = self.scores.shape[:2]
        heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        rows = [
            (head_label(*one), head_label(*other), *one, *other, self.kind, score)
            for one, line in zip(heads, self.scores.flatten(2).flatten(0, 1).tolist(), strict=True)
            for other, score in zip(heads, line, strict=True)
            if one[0] < other[0]
        ]
        places = ["earlier_layer", "earlier_head", "later_layer", "later_head"]
        table = pd.DataFrame(rows, columns=["earlier", "later", *places, "kind", "score"])
        table["over_baseline"] = table["score"] - self.baseline_mean
        table["z"] = table["over_baseline"] / self.baseline_std
        return table.sort_values("score", ascending=False, kind="stable", ignore_index=True)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PositionalAttention(Result):
    """How a head would attend if nothing but positions were in the stream."""

    head: tuple[int, int]
    pattern: Float[Tensor, "dest src"]
    """Attention after a causal softmax; each row sums to 1."""
    scale: float
    """What the model multiplies the product of a query and a key by."""
    normalized_positions: bool
    """Whether each position's vector was divided by its own scale, as the norm would do."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair of positions dest >= src: dest, src, attention."""
        import pandas as pd

        dest, src = torch.tril_indices(*self.pattern.shape)
        return pd.DataFrame(
            {"dest": dest.numpy(), "src": src.numpy(), "attention": self.pattern.cpu()[dest, src].numpy()}
        )
