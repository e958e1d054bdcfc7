"""Results of patching and ablation."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.results.base import Result
from mechlens.results.columns import Column
from mechlens.results.heads import head_label
from mechlens.results.many_effects import ManyEffects
from mechlens.text.display import count, number, visible_token

if TYPE_CHECKING:
    import pandas as pd


EFFECT = "Metric of the patched run minus that of the same run without the patch, averaged over prompts."
RECOVERED = "Share of the way from the run that was patched to the other run: 0 is none of it, 1 all of it."

ROUNDING = 1e-5
"""Relative difference of the same run in two batches."""


def cell_label(layer: int | None, head: int | None, position: int | None) -> str:
    """The name of a cell of a grid: `L5H5`, `L0 at 51`."""
    if layer is None:
        return "all" if position is None else f"position {position}"
    place = f"L{layer}" if head is None else head_label(layer, head)
    return place if position is None else f"{place} at {position}"


def standard_error(changes: Float[Tensor, "prompt *cell"]) -> Float[Tensor, "*cell"]:
    """Of the mean over prompts; nan for a single prompt."""
    if len(changes) < 2:
        return torch.full_like(changes[0], math.nan)
    return changes.std(0) / math.sqrt(len(changes))


def share_of_way(
    effect: Float[Tensor, "*cell"], start: Float[Tensor, " prompt"], end: Float[Tensor, " prompt"]
) -> Float[Tensor, "*cell"]:
    """Mean effects divided by the mean difference of two runs; nan if that difference is rounding, or nan."""
    way = (end - start).mean()
    known = bool(way.abs() > ROUNDING * (start.abs() + end.abs()).mean())
    return effect / way if known else torch.full_like(effect, math.nan)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Grid(Result):
    """The arguments of a grid of patches, and what follows from its values."""

    tokens: Int[Tensor, "prompt pos"]
    """The clean prompts."""
    site: str
    """What is patched: `mlp_out`, `z`, ..."""
    source: str
    """Where the values come from, in words."""
    given: dict[str, Int[Tensor, "some any"]]
    """The other token ids that were given: the `corrupted` prompts, the `reference` of `Mean` and
    `Resampled`, and `target` and `against` at the positions in `at`."""
    weight: float
    """How much of the values is mixed in: 1 replaces the run's own values, 0 leaves them."""
    into: str
    """Which run is patched: `clean` (noising) or `corrupted` (denoising)."""
    axes: tuple[str, ...]
    """The axes of the grid, in order: some of `layer`, `head`, `pos`. Everything else is patched together."""
    layers: tuple[int, ...]
    """The layers that are patched."""
    heads: tuple[tuple[int, int], ...]
    """(layer, head) of the heads that are patched; empty where all are patched together."""
    positions: tuple[int, ...]
    """The positions that are patched; empty where all are patched together."""
    metric: str
    """Such as `loss`, averaged over the positions in `at`."""
    unit: str
    """Of the metric: `nats`, `logits`, or empty for a function."""
    about: str
    """The token or tokens that `log_prob` or `logit_diff` is about, if they are the same everywhere;
    otherwise empty."""
    at: tuple[int, ...]
    """The positions whose predictions of the next token the metric reads."""
    clean: Float[Tensor, " prompt"]
    """The metric of the clean run, without any patch."""
    corrupted: Float[Tensor, " prompt"]
    """The metric of the corrupted run; nan if there is none."""
    strings: tuple[str, ...]
    """The tokens of the first prompt as text."""
    seed: int | None
    """Seed of the values that were drawn; None if none were."""
    prepend_bos: bool

    @property
    def columns(self) -> tuple[Column, ...]:  # type: ignore[override]  # the unit is the metric's
        """The columns of `summary()`, without those that would be empty."""
        one = len(self.tokens) == 1
        found = [
            Column("cell", "patched"),
            *([Column("token")] if one and "pos" in self.axes else []),
            Column("effect", "change", self.unit, signed=True, help=EFFECT),
            *([] if one else [Column("standard_error", "", self.unit, help="Of the effect, over prompts.")]),
            Column("mean", "patched run", self.unit, help="Mean metric of the patched runs over prompts."),
            *([Column("recovered", help=RECOVERED)] if self.has_recovered else []),
        ]
        return tuple(found)

    @property
    def title(self) -> str:
        return f"Patches of {self.site} in {self.model.name}"

    @property
    def has_recovered(self) -> bool:
        """Whether there is another run to recover."""
        return not bool(self.recovered.isnan().all())

    @property
    def about_metric(self) -> str:
        """The metric, with the token or tokens that it is about."""
        return f"{self.metric} of {self.about}" if self.about else self.metric

    @property
    def put_there(self) -> str:
        """Where the values come from, in words."""
        source = "a function's values" if self.source == "<lambda>" else self.source
        return source if self.weight == 1 else f"{source}, weight {self.weight:g}"

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The cells with the largest effects, either way, with the columns of `columns`."""
        table = self.largest(top)
        if "pos" in table:
            table["token"] = [visible_token(self.strings[pos]) for pos in table["pos"]]
        return table[[each.name for each in self.columns]]

    def largest(self, top: int) -> pd.DataFrame:
        """The rows of `to_dataframe()` with the largest effects, either way; a column `cell` names them."""
        table = self.to_dataframe().dropna(subset="effect")
        table = table.sort_values("effect", key=abs, ascending=False, kind="stable").head(top)
        places = [table[axis] if axis in table else [None] * len(table) for axis in ("layer", "head", "pos")]
        table["cell"] = [cell_label(*cell) for cell in zip(*places, strict=True)]
        return table

    def describe(self) -> str:
        """The prompts and the metric without a patch, in a sentence or two."""
        unit = f" {self.unit}" if self.unit else ""
        corrupted = float(self.corrupted.mean())
        said = (
            f"{count(len(self.tokens), 'prompt')} of {self.tokens.shape[1]} tokens. Without a patch the "
            f"{self.about_metric} is {number(float(self.clean.mean()))}{unit}"
        )
        if corrupted == corrupted:
            said += f" in the clean run, {number(corrupted)} in the corrupted run"
        return f"{said}."

    @property
    def effect(self) -> Float[Tensor, "*grid"]:
        """Metric of the patched run minus that of the same run without a patch, averaged over prompts."""
        return self._changes().mean(0)

    @property
    def standard_error(self) -> Float[Tensor, "*grid"]:
        """Of `effect`, over prompts; nan for a single prompt."""
        return standard_error(self._changes())

    @property
    def n_prompts(self) -> int:
        return len(self.tokens)

    @property
    def mean(self) -> Float[Tensor, "*grid"]:
        """Mean metric of the patched runs over prompts."""
        return self.base.mean() + self.effect

    @property
    def recovered(self) -> Float[Tensor, "*grid"]:
        """The share of the way from the run that was patched to the other run: 0 is none of it, 1 all of it.

        This is the mean effect divided by the mean difference of the two runs; patching into the corrupted
        run, 1 restores the clean run's metric. nan without a corrupted run, or if both have the same metric.
        """
        return share_of_way(self.effect, self.base, self.corrupted if self.into == "clean" else self.clean)

    @property
    def base(self) -> Float[Tensor, " prompt"]:
        """The metric of the run that is patched, without the patch."""
        return self.clean if self.into == "clean" else self.corrupted

    def labels(self, axis: str) -> tuple[int, ...]:
        """The layers, head numbers or positions along an axis of the grid."""
        if axis == "head":
            return tuple(sorted({head for _, head in self.heads}))
        return self.layers if axis == "layer" else self.positions

    def _changes(self) -> Float[Tensor, "prompt *grid"]:
        raise NotImplementedError  # each result has its own

    def _table(self) -> pd.DataFrame:
        """The table that `to_dataframe` returns."""
        import pandas as pd

        cells = list(itertools.product(*(self.labels(axis) for axis in self.axes)))
        table = pd.DataFrame(cells, columns=list(self.axes), index=range(len(cells)))
        if "head" in self.axes:
            pairs = list(zip(table["layer"], table["head"], strict=True))
            table["label"] = [head_label(layer, head) for layer, head in pairs]
        for name in ("mean", "effect", "standard_error", "recovered"):
            table[name] = getattr(self, name).reshape(-1).numpy()
        if "head" in self.axes:
            table = table[[pair in self.heads for pair in pairs]].reset_index(drop=True)
        return table


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PatchGridResult(ManyEffects, _Grid):
    """The metric of patched runs: one run for each cell of a grid and each prompt."""

    values: Float[Tensor, "prompt *grid"]
    """The metric of each patched run."""
    note: str
    """How the runs were made, if not the fast way; otherwise empty."""

    def _changes(self) -> Float[Tensor, "prompt *grid"]:
        return self.values - self.base.reshape(-1, *[1] * (self.values.ndim - 1))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell that was run: the axes, label (`L5H5`, for heads), mean, effect, standard_error,
        recovered."""
        return self._table()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AttributionPatchResult(_Grid):
    """A first-order estimate of the effect of each cell of a grid.

    `Patching.grid` gives the exact effect. The estimate is poor for patches that are large relative to the
    model's curvature, and where something saturates (attention patterns, norms).
    """

    estimate: Float[Tensor, "prompt *grid"]
    """The estimated effect; proportional to `weight`."""
    correlation: float | None
    """Pearson correlation of the mean estimate with the exact effect, over cells; nan if either does not
    vary, None if no exact grid was given."""

    def _changes(self) -> Float[Tensor, "prompt *grid"]:
        return self.estimate

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: the axes, label (`L5H5`, for heads), mean, effect, standard_error, recovered.

        All values are estimates. `standard_error` is over prompts and does not cover the approximation error.
        """
        return self._table()

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, approximation='first order')"
