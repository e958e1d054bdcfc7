"""What all studies give: several results, and published claims beside measured numbers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mechlens.results import Comparison, Result, write_table

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True)
class Study:
    """Base of all studies; what a study measured is in its further fields."""

    comparisons: tuple[Comparison, ...]
    """Published or claimed figures beside the measured ones; empty for a model without any."""

    @property
    def results(self) -> Mapping[str, Result]:
        """Every result, by the name of its file."""
        raise NotImplementedError  # each study has its own

    def to_dataframe(self) -> pd.DataFrame:
        """One row per figure: claim, published, measured, low, high, verdict, source."""
        import pandas as pd

        columns = [field.name for field in dataclasses.fields(Comparison)]
        return pd.DataFrame([dataclasses.asdict(c) for c in self.comparisons], columns=columns)

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write every result as `.safetensors` and its table as `.csv` into an existing folder.

        Returns:
            The paths written.

        Raises:
            ValueError: there is no such folder.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(
                f"a study is saved into a folder, but there is no folder {folder}: make it first"
            )
        written = []
        for name, result in self.results.items():
            written.append(result.save(folder / f"{name}.safetensors"))
            written.append(write_table(result.to_dataframe(), folder / f"{name}.csv"))
        written.append(write_table(self.to_dataframe(), folder / "comparison.csv"))
        return written
