"""Results of patching and ablation."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.results.base import Result
from mechlens.results.heads import head_label

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Grid(Result):
    """What was asked of a grid of patches."""

    tokens: Int[Tensor, "prompt pos"]
    """What the model read."""
    site: str
    """What is patched: `mlp_out`, `z`, ..."""
    source: str
    """Where the values that are put there come from, in words."""
    weight: float
    """How much of them: 1 replaces the clean value, 0 leaves it."""
    direction: str
    """`noising`: the run on `tokens` is patched; `denoising`: the corrupted one, with values of that."""
    axes: tuple[str, ...]
    """The axes of the grid, in order: some of `layer`, `head`, `pos`."""
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    """Empty where the grid has no axis `head`: all heads are patched together."""
    positions: tuple[int, ...]
    """Empty where the grid has no axis `pos`: all positions are patched together."""
    metric: str
    """Such as `loss`: mean over the positions of `read`, nats."""
    read: tuple[int, ...]
    """The positions at which the metric reads the model's prediction of the next token."""
    clean: Float[Tensor, " prompt"]
    """The metric of the run on `tokens`, without any patch."""
    corrupted: Float[Tensor, " prompt"]
    """The metric of the corrupted run; nan where there is none."""
    strings: tuple[str, ...]
    """The tokens of the first prompt as text."""
    seed: int | None
    """Of what was drawn to patch with; None where nothing was."""
    prepend_bos: bool

    def _cells(self) -> pd.DataFrame:
        """The axes of each cell, and for heads their label."""
        import pandas as pd

        every = {"layer": self.layers, "head": self.heads, "pos": self.positions}
        index = pd.MultiIndex.from_product([every[axis] for axis in self.axes], names=list(self.axes))
        table = index.to_frame(index=False)
        if "head" in self.axes:
            pairs = zip(table["layer"], table["head"], strict=True)
            table["label"] = [head_label(layer, head) for layer, head in pairs]
        return table


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PatchGridResult(_Grid):
    """A metric of patched runs, one run for each cell of a grid and each prompt."""

    values: Float[Tensor, "prompt *grid"]
    """The metric of each patched run."""
    note: str
    """How the runs were made, where that was not the fast way; else empty."""

    @property
    def mean(self) -> Float[Tensor, "*grid"]:
        """Mean metric over prompts."""
        return self.values.mean(0)

    @property
    def effect(self) -> Float[Tensor, "*grid"]:
        """Mean over prompts of the patched run's metric less the metric of the run that was patched."""
        return self._per_prompt().mean(0)

    @property
    def standard_error(self) -> Float[Tensor, "*grid"]:
        """Of `effect`, over prompts; nan for a single one."""
        return _standard_error(self._per_prompt())

    @property
    def recovered(self) -> Float[Tensor, "*grid"]:
        """Mean over prompts of how far a patch leads from the run that was patched to the other one: 0 is
        nothing, 1 all the way. nan without a corrupted run, or where both have the same metric."""
        start, end = (
            (self.clean, self.corrupted) if self.direction == "noising" else (self.corrupted, self.clean)
        )
        span = (end - start).reshape(-1, *[1] * (self.values.ndim - 1))
        share = (self.values - start.reshape(span.shape)) / span
        return share.masked_fill(~share.isfinite(), torch.nan).mean(0)

    def _per_prompt(self) -> Float[Tensor, "prompt *grid"]:
        base = self.clean if self.direction == "noising" else self.corrupted
        return self.values - base.reshape(-1, *[1] * (self.values.ndim - 1))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: the axes, label (`L5H5`, for heads), mean, effect, standard_error, recovered."""
        table = self._cells()
        for name in ("mean", "effect", "standard_error", "recovered"):
            table[name] = getattr(self, name).reshape(-1).numpy()
        return table


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AttributionPatchResult(_Grid):
    """An approximation: what patching would do to a metric, to first order, for each cell of a grid.

    The exact effect is that of `patch_grid`. A patch that is large for the model's curvature, and whatever
    saturates (an attention pattern, a norm), is estimated badly.
    """

    estimate: Float[Tensor, "prompt *grid"]
    """Of the effect: the patched run's metric less that of the run that would be patched; proportional to
    `weight`."""
    correlation: float | None
    """Pearson's, between the mean estimate and the exact effect over the cells; nan where one of them does
    not vary; None where no exact grid was given."""

    @property
    def effect(self) -> Float[Tensor, "*grid"]:
        """The estimated effect, mean over prompts."""
        return self.estimate.mean(0)

    @property
    def standard_error(self) -> Float[Tensor, "*grid"]:
        """Of `effect`, over prompts; nan for a single one. It does not know of the approximation's error."""
        return _standard_error(self.estimate)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: the axes, label (`L5H5`, for heads), estimated_effect, standard_error."""
        table = self._cells()
        table["estimated_effect"] = self.effect.reshape(-1).numpy()
        table["standard_error"] = self.standard_error.reshape(-1).numpy()
        return table

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, approximation='first order')"


def _standard_error(each: Float[Tensor, "prompt *grid"]) -> Float[Tensor, "*grid"]:
    if len(each) < 2:
        return torch.full_like(each[0], math.nan)
    return each.std(0) / math.sqrt(len(each))
