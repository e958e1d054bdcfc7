"""Whether heads copy or suppress what they attend to."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from mechlens.results.base import Result
from mechlens.results.columns import Column
from mechlens.results.heads import head_table

if TYPE_CHECKING:
    import pandas as pd

SHARES = ("copies", "suppresses", "attends_to_predicted")
"""What a head's weights can do with a token. The null of each is called `null_copies` and so on."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CopyScores(Result):
    """How often each head's weights raise or lower the token that it attends to, and attend to the predicted
    token."""

    ids: Int[Tensor, " token"]
    """The tokens that were tried."""
    strings: tuple[str, ...]
    """The same as text."""
    top_k: int
    """How many logits count, at either end."""
    copies: Float[Tensor, "layer head"]
    """Share of tokens that are among the `top_k` largest logits of the head's output for them."""
    suppresses: Float[Tensor, "layer head"]
    """Share of tokens that are among the `top_k` smallest."""
    attends_to_predicted: Float[Tensor, "layer head"]
    """Share of tokens whose unembedding, as the query, scores highest with the token's own key."""
    null_copies: Float[Tensor, "layer head"]
    """Share of tokens for which another of the tokens is among the largest."""
    null_suppresses: Float[Tensor, "layer head"]
    """Share of tokens for which another of the tokens is among the smallest."""
    null_attends_to_predicted: Float[Tensor, "layer head"]
    """Share of tokens for which the key of another of the tokens scores highest."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("label", "head"),
        Column("copies", help="Share of tokens that the head raises most when it attends to them."),
        Column("null_copies", "null", help="The same for another of the tokens."),
        Column("suppresses", help="Share of tokens that the head lowers most when it attends to them."),
        Column("null_suppresses", "null", help="The same for another of the tokens."),
        Column(
            "attends_to_predicted",
            "attends to predicted",
            help="Share of tokens that the head attends to most where the stream predicts them.",
        ),
        Column("null_attends_to_predicted", "null", help="The same for another of the tokens."),
    )

    @property
    def title(self) -> str:
        return f"Copy scores of {self.model.name}"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head: layer, head, label, and each of copies, suppresses, attends_to_predicted with its
        null, such as null_copies."""
        names = [name for share in SHARES for name in (share, f"null_{share}")]
        return head_table(**{name: getattr(self, name) for name in names})

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The heads that copy or suppress most."""
        table = self.to_dataframe()
        order = table[["copies", "suppresses"]].max(axis=1).sort_values(ascending=False, kind="stable").index
        return table.loc[order].head(top)[[each.name for each in self.columns]]
