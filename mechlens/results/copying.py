"""Whether heads copy or suppress what they attend to."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from mechlens.results.base import Result
from mechlens.results.columns import Column
from mechlens.results.heads import head_label

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CopyScores(Result):
    """How often each head's weights raise or lower the token that it attends to."""

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
    null_copies: Float[Tensor, "layer head"]
    """Share of tokens for which another of the tokens is among the largest."""
    null_suppresses: Float[Tensor, "layer head"]
    """Share of tokens for which another of the tokens is among the smallest."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("label", "head"),
        Column("copies", help="Share of tokens that the head raises most when it attends to them."),
        Column("null_copies", "null", help="The same for another of the tokens."),
        Column("suppresses", help="Share of tokens that the head lowers most when it attends to them."),
        Column("null_suppresses", "null", help="The same for another of the tokens."),
    )

    @property
    def title(self) -> str:
        return f"Copy scores of {self.model.name}"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head: layer, head, label, copies, null_copies, suppresses, null_suppresses."""
        import pandas as pd

        n_layers, n_heads = self.copies.shape
        places = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        table = pd.DataFrame(places, columns=["layer", "head"])
        table["label"] = [head_label(*place) for place in places]
        for name in ("copies", "null_copies", "suppresses", "null_suppresses"):
            table[name] = getattr(self, name).flatten().numpy()
        return table

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The heads that copy or suppress most."""
        table = self.to_dataframe()
        order = table[["copies", "suppresses"]].max(axis=1).sort_values(ascending=False, kind="stable").index
        return table.loc[order].head(top)[[each.name for each in self.columns]]
