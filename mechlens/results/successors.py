"""Whether heads turn what they attend to into its successor."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.results.base import Result
from mechlens.results.columns import Column
from mechlens.results.heads import head_table

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SuccessorScores(Result):
    """How often each head's weights turn the token that it attends to into its successor."""

    classes: tuple[str, ...]
    """Names of the classes of tokens, such as `days`."""
    sizes: tuple[int, ...]
    """How many tokens with a successor each class has."""
    ids: Int[Tensor, " token"]
    """The tokens that were tried, class by class."""
    successor_ids: Int[Tensor, " token"]
    strings: tuple[str, ...]
    """The tokens as text."""
    successor_strings: tuple[str, ...]
    by_class: Float[Tensor, "kind layer head"]
    """Share of a class's tokens whose successor has the largest logit of the class."""
    null_by_class: Float[Tensor, "kind layer head"]
    """The share for the successor of another token of the class, a mean over all others."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("label", "head"),
        Column("score", help="Share of tokens whose successor has the largest logit of its class."),
        Column("null", help="The same for the successor of another token of the class."),
    )

    @property
    def title(self) -> str:
        return f"Successor scores of {self.model.name}"

    @property
    def scores(self) -> Float[Tensor, "layer head"]:
        """The share over the tokens of all classes."""
        return self._mean(self.by_class)

    @property
    def nulls(self) -> Float[Tensor, "layer head"]:
        """The share for the successor of another token."""
        return self._mean(self.null_by_class)

    def _mean(self, values: Float[Tensor, "kind layer head"]) -> Float[Tensor, "layer head"]:
        sizes = torch.tensor(self.sizes, dtype=values.dtype)
        return einsum(values, sizes / sizes.sum(), "kind layer head, kind -> layer head")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head: layer, head, label, score, null, and the score on each class, such as
        number_words."""
        names = [name.replace(" ", "_") for name in self.classes]
        return head_table(score=self.scores, null=self.nulls, **dict(zip(names, self.by_class, strict=True)))

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The heads with the highest scores."""
        table = self.to_dataframe().sort_values("score", ascending=False, kind="stable")
        return table.head(top)[[each.name for each in self.columns]]
