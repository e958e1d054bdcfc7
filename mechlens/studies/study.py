"""What all studies give: several results, and published claims beside measured numbers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mechlens.measures.statistics import bootstrap_interval
from mechlens.published import Published
from mechlens.results import NOT_JUDGED, Comparison, Result, write_table

if TYPE_CHECKING:
    import pandas as pd


MIN_DRAWS = 20
"""Fewer draws do not tell how far one strays, so nothing is judged by them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """A number, or the name of a head, that a figure can be held against."""

    claim: str
    value: float | str
    tolerance: float = 0.0
    """Of a number that nothing is drawn for: how far another processor's or engine's rounding may lead. Whole
    numbers, such as that of a layer, have whole tolerances."""
    samples: Tensor | None = None
    """Independent draws that the number is the mean of."""
    among: Tensor | None = None
    """Of a number that nothing is drawn for: what it is the mean of, such as facts of our choice."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of 95%, from drawing anew among these."""
        some = self.among if self.samples is None else self.samples
        if some is None or len(some) < 2:
            return None
        low, high = bootstrap_interval(some)
        return float(low), float(high)


def hold(figure: Published, measured: Measured) -> Comparison:
    """One figure beside what was measured.

    A figure that is a mean over n draws is reproduced when it differs from our mean over m by no more than
    99% of such differences do: when it lies in the interval of 99% of means over 1 / (1/n + 1/m) draws,
    resampled from our own. With fewer than `MIN_DRAWS` of our own nothing is judged.
    """
    low = high = None
    exact = isinstance(measured.value, int) and not measured.tolerance
    if exact or isinstance(figure.value, str) or isinstance(measured.value, str):
        holds = figure.value == measured.value
    elif measured.samples is None:
        low, high = figure.value - measured.tolerance, figure.value + measured.tolerance
        holds = low <= measured.value <= high
    elif len(measured.samples) < MIN_DRAWS:
        return Comparison(measured.claim, figure.value, measured.value, None, None, NOT_JUDGED, figure.source)
    else:
        size = max(1, round(1 / (1 / figure.sequences + 1 / len(measured.samples))))
        low, high = _means(measured.samples, size)
        holds = low <= figure.value <= high
    verdict = "reproduced" if holds else "not reproduced"
    return Comparison(measured.claim, figure.value, measured.value, low, high, verdict, figure.source)


def _means(samples: Tensor, size: int) -> tuple[float, float]:
    """The interval of 99% of means over `size` of the samples."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(samples), (20000, size), generator=generator)
    means = samples.double()[drawn].mean(1)
    low, high = means.quantile(torch.tensor([0.005, 0.995], dtype=torch.double)).tolist()
    return low, high


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
