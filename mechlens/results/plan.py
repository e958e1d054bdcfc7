"""What an analysis would take: runs, arithmetic, memory and time."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from mechlens.progress import duration
from mechlens.results.base import Result
from mechlens.results.columns import Column
from mechlens.text.display import count

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Plan(Result):
    """What an analysis would take, measured on a part of each of its loops."""

    analysis: str
    """Its name."""
    runs: int
    """Sequences that the model would run, whole or from a later layer on."""
    tokens: int
    """Their positions."""
    flop: float
    """Floating-point additions and multiplications of matrix products and attention."""
    bytes: int
    """Peak memory besides the model's weights, in the part that was run."""
    seconds: float
    """How long it would take here."""
    loops: dict[str, tuple[float, float]]
    """For each loop that was shortened, how many of its units were run, and how many there are."""
    note: str
    """What the plan leaves out; empty if nothing."""

    columns: ClassVar[tuple[Column, ...]] = (Column("quantity", ""), Column("value", "", digits=1))

    @property
    def title(self) -> str:
        return f"Plan of {self.analysis} with {self.model.name}"

    @property
    def words(self) -> str:
        """All of it in a few sentences."""
        rate = f" at {self.flop / self.seconds / 1e9:,.3g} GFLOP a second" if self.flop else ""
        parts = [
            f"About {duration(self.seconds)}{rate}: {count(self.runs, 'run')} with "
            f"{count(self.tokens, 'token')}, {self.flop / 1e12:,.3g} TFLOP, and at least "
            f"{self.bytes / 2**20:,.0f} MiB besides the model."
        ]
        if self.loops:
            measured = ", ".join(
                f"{done:,.0f} of {total:,.0f} {name}" for name, (done, total) in self.loops.items()
            )
            parts.append(f"Scaled up from {measured}.")
        return " ".join([*parts, *([f"{self.note}."] if self.note else [])])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per quantity: quantity, value."""
        import pandas as pd

        values = {
            "runs": self.runs,
            "tokens": self.tokens,
            "TFLOP": self.flop / 1e12,
            "MiB besides the model": self.bytes / 2**20,
            "seconds": self.seconds,
        }
        return pd.DataFrame({"quantity": list(values), "value": [float(v) for v in values.values()]})
