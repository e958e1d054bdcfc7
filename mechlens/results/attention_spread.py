"""The result of `attention_spread`."""

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
class AttentionSpread(Result):
    """How widely each head spreads its attention on some sequences."""

    tokens: Int[Tensor, "batch pos"]
    """What the model read."""
    values: Float[Tensor, "layer head measure"]
    """Each of `measures`, averaged over sequences and positions."""
    prepend_bos: bool

    columns: ClassVar = (
        Column("label", "head"),
        Column("entropy", unit="nats", help="Of one position's attention; 0 if it attends to one token."),
        Column("distance", unit="tokens", digits=1, help="Mean distance to the token attended to."),
        Column("first", "on the first token", help="Attention to the first token, where idle heads rest."),
    )
    measures: ClassVar = ("entropy", "distance", "first")
    """The entries of the axis `measure`."""

    def of(self, measure: str) -> Float[Tensor, "layer head"]:
        """One measure for every head."""
        return self.values[..., self.measures.index(measure)]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head: layer, head, label, entropy, distance, first."""
        import pandas as pd

        n_layers, n_heads, _ = self.values.shape
        places = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        table = pd.DataFrame(places, columns=["layer", "head"])
        table["label"] = [head_label(*place) for place in places]
        return table.join(pd.DataFrame(self.values.flatten(0, 1).numpy(), columns=[*self.measures]))

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The most focused heads that do not rest on the first token."""
        table = self.to_dataframe()
        return table[table["first"] < 0.5].sort_values("entropy", kind="stable").head(top)
