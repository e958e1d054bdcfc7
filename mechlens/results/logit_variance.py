"""How much the logits of probable and improbable tokens vary over layers."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from mechlens.results.base import Result, row_place
from mechlens.results.columns import Column

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LogitVariance(Result):
    """How the lens's logits vary over layers, for tokens binned by their final rank at the same position.

    Logits are taken before a soft-cap and centered over the vocabulary, so that processed and raw weights
    agree. Unless noted, values are means over the tokens of a bin.
    """

    tokens: Int[Tensor, "batch pos"]
    """What the model read."""
    positions: tuple[int, ...]
    """The positions that were read out, in order along the axis `read`."""
    rows: tuple[str, ...]
    """`embed`, then the layers by number; the last is the model's own final logits."""
    bins: tuple[tuple[int, int], ...]
    """First and last final rank of each bin; rank 1 is the most likely token."""
    probability: Float[Tensor, "bin batch read"]
    """Total final probability of the tokens of a bin."""
    variance: Float[Tensor, "bin batch read"]
    """Variance of a token's logit over the layers, without `embed`, in logits²."""
    null_variance: Float[Tensor, "null bin"]
    """The same with tokens assigned to bins at random, averaged over positions, for each draw."""
    elsewhere_variance: Float[Tensor, "bin batch read"]
    """The same with tokens binned by their final rank at another position, drawn at random: the effect of
    tokens that are improbable in any context. nan if a single position was read."""
    mean_logit: Float[Tensor, "row bin batch read"]
    """Logits."""
    spread: Float[Tensor, "row bin batch read"]
    """Standard deviation of the logits over the tokens of the bin."""
    excess: Float[Tensor, "row bin batch read"]
    """Distance |logit - final logit|; 0 in the last row."""
    seed: int
    """Seed of the random assignments."""
    prepend_bos: bool

    columns: ClassVar = (
        Column("bin", "final rank"),
        Column("probability", "final probability", help="Of the bin's tokens together."),
        Column("variance", "variance over layers", "logits²"),
        Column("null_variance", "variance in random bins", "logits²"),
        Column("elsewhere_variance", "variance, ranked at another position", "logits²"),
    )

    @property
    def labels(self) -> tuple[str, ...]:
        """The bins as text, such as `1` and `2-10`."""
        return tuple(str(first) if first == last else f"{first}-{last}" for first, last in self.bins)

    def estimates(self) -> dict[str, float]:
        """The conjecture in numbers, as means over all positions.

        `variance_ratio` is the variance of the least probable bin over the variance of the most probable one.
        `null_ratio` (with its lowest and highest draw) and `elsewhere_ratio` are the same for the nulls and
        for bins from another position. For the least probable bin alone, `peak_excess` is the largest excess
        over layers, `peak_row` its layer, `left_before_last` the share of it left one layer before the last,
        and `spread_bulge` the largest spread over layers as a multiple of the final spread. nan if there is a
        single layer or bin.
        """
        nulls = (self.null_variance[:, -1] / self.null_variance[:, 0]).double()
        excess = self.excess[1:, -1].double().mean((1, 2))
        spread = self.spread[1:, -1].double().mean((1, 2))
        has_layers = len(excess) > 1
        return {
            "variance_ratio": _ratio(self.variance),
            "null_ratio": float(nulls.mean()) if len(nulls) else math.nan,
            "null_ratio_low": float(nulls.min()) if len(nulls) else math.nan,
            "null_ratio_high": float(nulls.max()) if len(nulls) else math.nan,
            "elsewhere_ratio": _ratio(self.elsewhere_variance),
            "peak_excess": float(excess.max()) if has_layers else math.nan,
            "peak_row": float(excess.argmax()) if has_layers else math.nan,
            "left_before_last": float(excess[-2] / excess.max()) if has_layers else math.nan,
            "spread_bulge": float(spread.max() / spread[-1]),
        }

    def summary(self, top: int = 10) -> pd.DataFrame:
        """Each bin's probability and variances, as means over all positions."""
        table = self.to_dataframe()[[each.name for each in self.columns]]
        return table.groupby("bin", sort=False).mean().reset_index().head(top)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per row of the lens, bin, sequence and position: row, layer (-1 for `embed`), bin,
        first_rank, last_rank, sequence, pos, mean_logit, spread, excess; and, the same for all rows of a bin,
        probability, variance, elsewhere_variance, null_variance (mean over draws and positions)."""
        import pandas as pd

        n_rows, n_bins, batch, read = self.mean_logit.shape
        index = pd.MultiIndex.from_product(
            [self.rows, range(n_bins), range(batch), self.positions], names=["row", "bin", "sequence", "pos"]
        )
        table = index.to_frame(index=False)
        which = table["bin"].tolist()
        table["bin"] = [self.labels[i] for i in which]
        table.insert(1, "layer", [row_place(row)[0] for row in table["row"]])
        table.insert(3, "first_rank", [self.bins[i][0] for i in which])
        table.insert(4, "last_rank", [self.bins[i][1] for i in which])
        null = self.null_variance.mean(0)[:, None, None].expand(n_bins, batch, read)
        columns: dict[str, Any] = {
            "mean_logit": self.mean_logit,
            "spread": self.spread,
            "excess": self.excess,
            "probability": self.probability.expand(n_rows, -1, -1, -1),
            "variance": self.variance.expand(n_rows, -1, -1, -1),
            "elsewhere_variance": self.elsewhere_variance.expand(n_rows, -1, -1, -1),
            "null_variance": null.expand(n_rows, -1, -1, -1),
        }
        for name, values in columns.items():
            table[name] = values.reshape(-1).numpy()
        return table


def _ratio(variance: Float[Tensor, "bin batch read"]) -> float:
    by_bin = variance.double().mean((1, 2))
    return float(by_bin[-1] / by_bin[0])
