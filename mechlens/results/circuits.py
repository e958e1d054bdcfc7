"""Results about circuits: products of a model's weights, stored as their two thin factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Complex, Float, Int, Real
from torch import Tensor

from mechlens.arguments import check_counts
from mechlens.measures import weights as measures
from mechlens.results.base import Result
from mechlens.results.columns import Column
from mechlens.results.heads import head_label
from mechlens.text.display import number

if TYPE_CHECKING:
    import pandas as pd

_ROTARY = {
    "ignored": "queries and keys without their rotation",
    "unrotated": "only the dimensions that are not rotated",
}


def _rotation(rotary: str, relative_position: int | None) -> str:
    """How the rotation of queries and keys was handled, for a title; empty if there is none."""
    if rotary == "relative":
        return f"each key {relative_position} before its query"
    return _ROTARY.get(rotary, "")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Circuit(Result):
    """A product of weights `A @ B`, stored as its thin factors.

    Rows belong to the first of `axes`, columns to the second. With the axes `query` and `key`, entry (i, j)
    is the attention score of query i with key j. With `source` and `destination`, it is what source i writes
    to destination j.
    """

    A: Float[Tensor, "row inner"]
    B: Float[Tensor, "inner column"]
    axes: tuple[str, str]
    """(`query`, `key`) or (`source`, `destination`)."""
    spaces: tuple[str, str]
    """What rows and columns are: `tokens`, `d_model` or `positions`."""
    name: str
    """Such as `full OV of L5H5`."""
    heads: tuple[tuple[int, int], ...]
    """(layer, head) of every head whose weights are in the product or the sum, earliest first."""
    embedding: str
    """How tokens are embedded: `W_E`, or `effective` (`W_E` plus the first MLP applied to it); `none` if
    neither axis is over tokens."""
    rotary: str
    """How the rotation of queries and keys was handled: `none` (there is none), `relative` (they are rotated
    `relative_position` apart), or `unrotated` (only the dimensions that are not rotated are kept)."""
    relative_position: int | None
    """How many tokens the key comes before the query, in a rotary model."""
    normalized_positions: bool
    """Whether each position's vector was divided by its own scale."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("index"),
        Column("singular_value"),
        Column("share", help="Share of the sum of squares of all entries."),
    )

    @property
    def shape(self) -> tuple[int, int]:
        return self.A.shape[0], self.B.shape[1]

    @property
    def is_zero(self) -> bool:
        """Whether a factor is all zeros, as for a pruned head. All entries are then equal, and how often a
        token matches itself is undefined."""
        return not bool(self.A.any() and self.B.any())

    @property
    def title(self) -> str:
        return f"{self.name[0].upper()}{self.name[1:]}"

    @property
    def rotation(self) -> str:
        """How the rotation of queries and keys was handled, in words; empty if there is none."""
        return _rotation(self.rotary, self.relative_position)

    @property
    def score_name(self) -> str:
        """The name of `copying_score()`: queries match keys, sources copy to destinations."""
        return "matching score" if self.axes == ("query", "key") else "copying score"

    @property
    def entry(self) -> str:
        """What an entry is, in words."""
        if self.axes == ("query", "key"):
            return "attention score before the model's scale"
        if self.spaces[1] == "tokens":
            return "what attending to the source adds to the destination's logit"
        return "what the source writes to the destination"

    @property
    def matrix(self) -> Any:
        """The circuit as TransformerLens's `FactoredMatrix`; its `.AB` builds the whole matrix."""
        from transformer_lens import FactoredMatrix

        return FactoredMatrix(self.A, self.B)

    def self_ranks(
        self,
        over: str | None = None,
        *,
        tokens: Int[Tensor, " token"] | Sequence[int] | None = None,
        ties: str = "for",
        progress: bool | None = None,
    ) -> Int[Tensor, " token"]:
        """Rank each token's entry with itself among its entries with all tokens.

        Args:
            over: the axis along which entries are compared. `key` (or `destination`; the default) compares,
                for each query, all keys; `query` (or `source`) compares, for each key, all queries.
            tokens: ids to rank; None ranks all. Each is compared with the whole vocabulary.
            ties: `for` counts only strictly larger entries; `against` counts equal ones too.
            progress: show a progress bar; None shows one in a terminal and in Jupyter.

        Returns:
            One rank per token; 1 is the largest entry.

        Raises:
            TypeError: tokens that are not integers.
            ValueError: the circuit is not square or not finite; an unknown axis or value of `ties`; a token
                out of range.

        Example:
            >>> mechlens.full_OV(model, "L3H5").self_ranks(tokens=[100, 200]).shape
            torch.Size([2])

        Cost: the product of the ranked rows with all columns, a tile at a time.
        """
        return measures.diagonal_ranks(self, over, tokens=tokens, ties=ties, progress=progress)

    def top_k_accuracy(
        self,
        k: int,
        over: str | None = None,
        *,
        tokens: Int[Tensor, " token"] | Sequence[int] | None = None,
        weights: Real[Tensor, " token"] | Sequence[float] | None = None,
        ties: str = "for",
        progress: bool | None = None,
    ) -> float:
        """The share of tokens whose entry with itself is among the k largest.

        Args:
            k: 1 asks whether the token's own entry is the largest.
            over: the axis along which entries are compared, by name; None is the second axis.
            tokens: ids to count; None counts all. Each is compared with the whole vocabulary.
            weights: one weight per counted token, such as its frequency; None weights all alike.
            ties: `for` counts only strictly larger entries; `against` counts equal ones too.
            progress: show a progress bar; None shows one in a terminal and in Jupyter.

        Returns:
            A share in [0, 1].

        Raises:
            TypeError: tokens or k that are not integers.
            ValueError: the circuit is not square or not finite; an unknown axis or `ties`; a token or
                k out of range; weights that are negative, not finite, all zero, or not one per token.

        Example:
            >>> circuit = mechlens.full_QK(model, "L3H5", rotary="unrotated")
            >>> 0 <= circuit.top_k_accuracy(1, "key", tokens=range(100)) <= 1
            True

        References: "How one can Interpret GPT2-Small", whose top-1 accuracy corresponds to `over="key"`.
        Cost: the product of the counted rows with all columns, a tile at a time.
        """
        return measures.top_k_accuracy(
            self, k, over, tokens=tokens, weights=weights, ties=ties, progress=progress
        )

    def eigenvalues(self) -> Complex[Tensor, " eigenvalue"]:
        """The eigenvalues that can be nonzero, largest in magnitude first.

        Raises:
            ValueError: the circuit is not square or not finite.

        Example:
            >>> mechlens.full_OV(model, "L3H5").eigenvalues().shape
            torch.Size([32])

        Cost: the eigenvalues of an `[inner, inner]` matrix.
        """
        return measures.eigenvalues(self)

    def copying_score(self) -> float:
        """How positive the eigenvalues are: `Σ Re λ / Σ |λ|`, in [-1, 1]; nan for a zero circuit.

        1 means that every token raises itself (OV), or matches itself (QK: a matching score).

        Raises:
            ValueError: the circuit is not square or not finite.

        Example:
            >>> mechlens.full_OV(model, "L3H5").copying_score() > 0.4
            True

        References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
        Cost: the eigenvalues of an `[inner, inner]` matrix.
        """
        return measures.eigenvalue_copying_score(self)

    def largest(self, n: int = 20, *, progress: bool | None = None) -> pd.DataFrame:
        """The n largest entries, as ids; `largest_pairs` adds the tokens' text.

        Returns:
            One row per entry, largest first: the id on each axis (such as `query_id`, `key_id`) and
            `value`.

        Raises:
            ValueError: n is out of range, or the circuit is not finite.

        Example:
            >>> mechlens.full_OV(model, "L3H5").largest(3).columns.tolist()
            ['source_id', 'destination_id', 'value']

        Cost: the whole product once, a tile at a time.
        """
        import pandas as pd

        found = measures.largest_entries(self, n, progress=progress)
        one, other = self.axes
        ids = {f"{one}_id": found.rows.tolist(), f"{other}_id": found.columns.tolist()}
        return pd.DataFrame(ids | {"value": found.values.tolist()})

    def corner(
        self, rows: Sequence[int] | None, columns: Sequence[int] | None
    ) -> Float[Tensor, "row column"]:
        """The entries in the given rows and columns; None takes all.

        Raises:
            TypeError: rows or columns that are not integers.
            ValueError: one is out of range.

        Example:
            >>> mechlens.full_OV(model, "L3H5").corner([5, 6, 7], [5]).shape
            torch.Size([3, 1])
        """
        return measures.corner(self, rows, columns)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per singular value, largest first: index, singular_value, share (of the sum of squares of
        all entries). For single entries, use `largest` or `corner`."""
        import pandas as pd

        small = torch.linalg.qr(self.A).R @ torch.linalg.qr(self.B.T).R.T
        values = torch.linalg.svdvals(small)
        share = values.square() / values.square().sum()
        return pd.DataFrame(
            {"index": range(len(values)), "singular_value": values.cpu(), "share": share.cpu()}
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CircuitSummary(Circuit):
    """A circuit between tokens with what to read first: accuracies, largest entries, and a corner."""

    ks: tuple[int, ...]
    accuracy: Float[Tensor, "axis k"]
    """Top-k accuracy over the whole vocabulary, for each of `axes` (along which entries are compared) and
    each of `ks`; nan for a zero circuit."""
    pairs: Int[Tensor, "pair side"]
    """Token ids of the largest entries, largest first, one per axis."""
    values: Float[Tensor, " pair"]
    shown: tuple[int, ...]
    """Token ids of the corner that is shown, on both axes."""
    strings: dict[str, str]
    """The text of every token in `pairs` and `shown`, keyed by its id as a string."""

    columns: ClassVar = (Column("value", "entry"),)

    @property
    def score(self) -> str:
        """`copying_score()` as text."""
        value = self.copying_score()
        return "undefined" if math.isnan(value) else number(value)

    def accuracy_of(self, axis: str) -> dict[int, float]:
        """Top-k accuracy by k, where entries are compared along this axis."""
        return dict(zip(self.ks, self.accuracy[self.axes.index(axis)].tolist(), strict=True))

    def corner_table(self) -> pd.DataFrame:
        """The entries between the tokens in `shown`, as `circuit_corner` returns them."""
        import pandas as pd

        texts = [self.strings[str(token)] for token in self.shown]
        sides = [pd.Index(texts, name=axis) for axis in self.axes]
        return pd.DataFrame(
            self.corner(self.shown, self.shown).cpu().numpy(), index=sides[0], columns=sides[1]
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair of tokens, largest entry first: for each axis the token's id (such as `query_id`)
        and text (`query`), then `value`."""
        import pandas as pd

        table: dict[str, Any] = {}
        for axis, ids in zip(self.axes, self.pairs.T.tolist(), strict=True):
            table |= {f"{axis}_id": ids, axis: [self.strings[str(token)] for token in ids]}
        return pd.DataFrame(table | {"value": self.values.tolist()})

    def to_json(self) -> dict[str, Any]:
        """Names, accuracies by the axis of comparison, the largest pairs as rows, and the corner that is
        shown."""
        part = self.corner_table()
        return super().to_json() | {
            "shape": list(self.shape),
            "accuracy": {
                axis: {f"top_{k}": share for k, share in self.accuracy_of(axis).items()} for axis in self.axes
            },
            "copying_score": self.copying_score(),
            "corner": {
                self.axes[0]: list(part.index),
                self.axes[1]: list(part.columns),
                "entries": part.to_numpy().tolist(),
            },
        }


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CompositionScores(Result):
    """How much of what each head reads could come from each earlier head, by weights alone."""

    kind: str
    """The later head's input: `q`, `k` or `v`."""
    scores: Float[Tensor, "layer head layer head"]
    """`[earlier layer, head, later layer, head]`, in [0, 1]; nan unless the first layer is before the second,
    and if a head's weights are all zero."""
    baseline_mean: float
    """Mean score of heads of the same sizes with random weights."""
    baseline_std: float
    """Standard deviation of one such score."""
    baseline_draws: int
    seed: int
    """Seed of the random weights."""
    rotary: str
    """How the rotation of queries and keys was handled: `none`, `relative`, or `ignored` (a rotary model's
    `W_Q @ W_K.T` was taken without rotation, as TransformerLens does)."""
    relative_position: int | None

    columns: ClassVar = (
        Column("earlier", help="The head that writes."),
        Column("later", help="The head that reads."),
        Column("score", help="Norm of the product of both heads' circuits over the product of their norms."),
        Column("over_baseline", signed=True, help="Score minus the mean of random weights."),
        Column(
            "z",
            "standard deviations",
            digits=1,
            signed=True,
            help="The same in standard deviations of the baseline.",
        ),
    )

    @property
    def title(self) -> str:
        return f"{self.kind.upper()}-composition of heads"

    @property
    def rotation(self) -> str:
        """How the rotation of queries and keys was handled, in words; empty if there is none."""
        return _rotation(self.rotary, self.relative_position)

    @property
    def over_baseline(self) -> Float[Tensor, "layer head layer head"]:
        """Scores minus the baseline's mean: around 0 for unrelated heads."""
        return self.scores - self.baseline_mean

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The `top` pairs with the highest scores, leaving out those that are not above the baseline.

        Raises:
            ArgumentError: `top` is below 1.
        """
        check_counts(top=top)
        table = self.to_dataframe().head(top)
        return table[table["over_baseline"] > 0][[each.name for each in self.columns]]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair of an earlier and a later head, highest score first: earlier, later (such as
        `L4H11`), earlier_layer, earlier_head, later_layer, later_head, kind, score, over_baseline, z.

        `z` is `over_baseline` in standard deviations of the baseline.
        """
        import pandas as pd

        n_layers, n_heads = self.scores.shape[:2]
        heads = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        pairs = rearrange(
            self.scores, "layer head later_layer later_head -> (layer head) (later_layer later_head)"
        )
        rows = [
            (head_label(*one), head_label(*other), *one, *other, self.kind, score)
            for one, line in zip(heads, pairs.tolist(), strict=True)
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
    """How a head would attend if the residual stream had only learned position embeddings in it."""

    head: tuple[int, int]
    pattern: Float[Tensor, "dest src"]
    """Attention after a causal softmax; each row sums to 1."""
    scale: float
    """The model's attention scale."""
    normalized_positions: bool
    """Whether each position's vector was divided by its own scale, as the norm would."""

    columns: ClassVar = (Column("dest", "destination"), Column("src", "source"), Column("attention"))

    @property
    def title(self) -> str:
        return f"Attention of {head_label(*self.head)} by positions alone"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair of positions dest >= src: dest, src, attention."""
        import pandas as pd

        dest, src = torch.tril_indices(*self.pattern.shape)
        return pd.DataFrame(
            {"dest": dest.numpy(), "src": src.numpy(), "attention": self.pattern.cpu()[dest, src].numpy()}
        )
