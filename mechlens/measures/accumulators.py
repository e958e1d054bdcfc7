"""Results accumulated over batches that are then discarded."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class TopRows:
    """The k largest values of each column so far, and their row numbers."""

    values: Float[Tensor, "k column"]
    """Largest first; minus infinity if there were fewer than k rows."""
    rows: Int[Tensor, "k column"]

    @classmethod
    def empty(cls, k: int, columns: int, device: torch.device | str = "cpu") -> TopRows:
        return cls(
            torch.full((k, columns), -torch.inf, dtype=torch.float32, device=device),
            torch.zeros(k, columns, dtype=torch.long, device=device),
        )

    def changed_by(self, largest: Float[Tensor, " column"]) -> Int[Tensor, " some"]:
        """The columns that change when rows with these column maxima are joined."""
        return (largest > self.values[-1]).nonzero()[:, 0]

    def joined(
        self,
        values: Float[Tensor, "row some"],
        numbers: Int[Tensor, " row"],
        columns: Int[Tensor, " some"] | None = None,
    ) -> TopRows:
        """The k largest values of these and further rows.

        Among equal values the earliest ranks highest. nan is never kept.

        Args:
            columns: the columns that `values` belong to, as from `changed_by`; None means all columns.

        Cost: one comparison per value, and k more in columns that change, which become rarer with every call.
        """
        if columns is None:
            columns = self.changed_by(values.amax(0))
            values = values[:, columns]
        if len(columns) == 0:
            return self
        pool = torch.cat([self.values[:, columns], values])
        pool_rows = torch.cat([self.rows[:, columns], numbers[:, None].expand(-1, len(columns))])
        best, best_rows = self.values.clone(), self.rows.clone()
        for rank in range(len(best)):
            # among equal values, `max` takes the first
            top, at = pool.max(0)
            best[rank, columns] = top
            best_rows[rank, columns] = pool_rows.gather(0, at[None])[0]
            pool.scatter_(0, at[None], -torch.inf)
        return TopRows(best, best_rows)
