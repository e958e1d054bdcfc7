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
    """Where the values that are put there come from, in words; of denoising the clean run."""
    given: dict[str, Int[Tensor, "some any"]]
    """What else was given, as token ids: the `corrupted` prompts, the `reference` of `Mean` and `Resampled`;
    `targets` and `against` at the positions of `read`."""
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
    about: str
    """The token or tokens that `log_prob` or `logit_diff` is of, where they are the same everywhere; else
    empty."""
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

    @property
    def effect(self) -> Float[Tensor, "*grid"]:
        """Mean over prompts of the patched run's metric less the metric of the run that was patched."""
        return self._changes().mean(0)

    @property
    def standard_error(self) -> Float[Tensor, "*grid"]:
        """Of `effect`, over prompts; nan for a single one."""
        changes = self._changes()
        if len(changes) < 2:
            return torch.full_like(changes[0], math.nan)
        return changes.std(0) / math.sqrt(len(changes))

    @property
    def mean(self) -> Float[Tensor, "*grid"]:
        """Mean metric of the patched runs over prompts."""
        return self._patched_run().mean() + self.effect

    @property
    def recovered(self) -> Float[Tensor, "*grid"]:
        """How far a patch leads from the run that was patched to the other one: 0 is nothing, 1 all the way.

        The mean effect in terms of the mean difference between the two runs. For denoising 1 is the clean
        run's metric; for noising it is the corrupted run's. nan without a corrupted run, or where both have
        the same metric.
        """
        start = self._patched_run()
        end = self.corrupted if start is self.clean else self.clean
        share = self.effect / (end - start).mean()
        return share.masked_fill(~share.isfinite(), torch.nan)

    def _patched_run(self) -> Float[Tensor, " prompt"]:
        """The metric of the run that is patched, without the patch."""
        return self.clean if self.direction == "noising" else self.corrupted

    def _changes(self) -> Float[Tensor, "prompt *grid"]:
        raise NotImplementedError  # each result has its own

    def _table(self) -> pd.DataFrame:
        """One row per cell: the axes, label (`L5H5`, for heads), mean, effect, standard_error, recovered."""
        import pandas as pd

        every = {"layer": self.layers, "head": self.heads, "pos": self.positions}
        index = pd.MultiIndex.from_product([every[axis] for axis in self.axes], names=list(self.axes))
        table = index.to_frame(index=False)
        if "head" in self.axes:
            pairs = zip(table["layer"], table["head"], strict=True)
            table["label"] = [head_label(layer, head) for layer, head in pairs]
        for name in ("mean", "effect", "standard_error", "recovered"):
            table[name] = getattr(self, name).reshape(-1).numpy()
        return table


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PatchGridResult(_Grid):
    """A metric of patched runs, one run for each cell of a grid and each prompt."""

    values: Float[Tensor, "prompt *grid"]
    """The metric of each patched run."""
    note: str
    """How the runs were made, where that was not the fast way; else empty."""

    def _changes(self) -> Float[Tensor, "prompt *grid"]:
        return self.values - self._patched_run().reshape(-1, *[1] * (self.values.ndim - 1))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: the axes, label (`L5H5`, for heads), mean, effect, standard_error, recovered."""
        return self._table()


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

    def _changes(self) -> Float[Tensor, "prompt *grid"]:
        return self.estimate

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: the axes, label (`L5H5`, for heads), mean, effect, standard_error, recovered.

        All of them are estimates; `standard_error` is over prompts, whatever the approximation's error.
        """
        return self._table()

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, approximation='first order')"
