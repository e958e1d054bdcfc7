"""Whole blocks skipped, repeated, or replaced by another model's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from mechlens.analyses.patching.sources import Source, Values, ValuesOf
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.clean_run import CleanRun
from mechlens.models.run.forward import runs_blocks_alone, watch_from
from mechlens.models.run.properties import alike
from mechlens.models.run.sites import SITES


@dataclasses.dataclass(frozen=True, eq=False)
class Skipped(Source):
    """A block's input in place of its output."""

    @property
    def label(self) -> str:
        return "skip"

    def keep(self, site: str, layers: Sequence[int]) -> list[str]:
        return super().keep("resid_pre", layers)

    def values(self, model: LensModel, site: str, layers: Sequence[int]) -> ValuesOf:
        return lambda own, other, index: lambda layer: own.at("resid_pre", layer)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Run(Source):
    """A block's output when run on the input or, to repeat it, the output of this model's block."""

    label_: str
    of: LensModel
    reads: str
    """The stream that the block runs on: `resid_pre` or `resid_post`."""

    @property
    def label(self) -> str:
        return self.label_

    def keep(self, site: str, layers: Sequence[int]) -> list[str]:
        return [*super().keep("resid_pre", layers), *super().keep("resid_post", layers)]

    def values(self, model: LensModel, site: str, layers: Sequence[int]) -> ValuesOf:
        def of_prompt(own: CleanRun, other: CleanRun, index: int) -> Values:
            # blocks run alone, without anything else that the model may pass them
            if runs_blocks_alone(self.of) and own.tokens.shape[1] > 1:
                run = own if self.of is model else CleanRun.of(self.of, own.tokens, self.keep(site, layers))
                for layer in layers:
                    if not alike(self._run(run.at("resid_pre", layer), layer), run.at("resid_post", layer)):
                        raise ValueError(
                            f"the block of layer {layer} cannot be run by itself on prompt {index}: its "
                            "output differs from that in the model"
                        )
            made = {layer: self._run(own.at(self.reads, layer), layer)[0] for layer in layers}
            return made.__getitem__

        return of_prompt

    def _run(self, stream: Tensor, layer: int) -> Tensor:
        found: dict[str, Tensor] = {}
        end = SITES["resid_post"].format(layer)
        watch_from(self.of, layer, stream.to(self.of.W_U), {end: partial(found.__setitem__, end)})
        return found[end]


def block_source(model: LensModel, how: Any) -> Source:
    """The source that replaces a block's output."""
    if how == "skip":
        return Skipped()
    if how == "repeat":
        return Run("repeat", model, "resid_post")
    if isinstance(how, str) or not hasattr(how, "cfg"):
        raise ArgumentError("how", "'skip', 'repeat' or a model", how)
    if (how.cfg.n_layers, how.cfg.d_model) != (model.cfg.n_layers, model.cfg.d_model):
        raise ValueError(
            f"blocks can be exchanged only between models of the same shape: the other model has "
            f"{how.cfg.n_layers} layers and d_model {how.cfg.d_model}, this one {model.cfg.n_layers} and "
            f"{model.cfg.d_model}"
        )
    return Run(f"block of {describe(how).name}", how, "resid_pre")
