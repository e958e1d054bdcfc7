"""Patched runs of several prompts together, going on from their clean run, and what is read of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.models.protocol import LensModel, engine_of
from mechlens.models.run.clean_run import CleanRun
from mechlens.models.run.forward import running, serve, watch, watch_from
from mechlens.models.run.patched_runs import TOKEN_BUDGET, row_charge
from mechlens.models.run.properties import alike
from mechlens.models.run.sites import SITES, last_hook
from mechlens.models.run.user_hooks import user_hooks

Hooks = Sequence[tuple[str, Callable[[Tensor, Any], Tensor]]]
"""By hook name, what is put there."""


@dataclasses.dataclass(frozen=True, eq=False)
class BatchedRuns:
    """Runs of some prompts that differ from the clean one from some layer on."""

    clean: CleanRun
    resumed: bool
    """Whether runs begin at the layer that is patched, on the clean stream; else each is a whole run."""
    parts: Sequence[slice]
    """The prompts that run together."""

    @classmethod
    def of(
        cls,
        model: LensModel,
        tokens: Int[Tensor, "prompt pos"],
        *,
        layers: Collection[int],
        keep: Collection[str],
    ) -> BatchedRuns:
        """Run the prompts clean.

        Runs begin in the middle of the model where blocks can be called one by one and, tried on the first of
        these prompts, that changes nothing. A hook of the user's may act on rows or on layers: where there is
        one, each prompt runs alone and whole.

        Args:
            layers: those that will be patched.
            keep: names of the hooks whose activations `clean` is to have.

        Cost: one forward pass of the prompts, and one of the first prompt from the first of the layers on.
        """
        hooked, n_pos = bool(user_hooks(model)), tokens.shape[1]
        at_once = 1 if hooked else max(1, int(TOKEN_BUDGET / row_charge(model, n_pos, n_pos)))
        parts = [slice(start, start + at_once) for start in range(0, len(tokens), at_once)]
        resumed = engine_of(model) == "HookedTransformer" and not hooked
        streams = [SITES["resid_pre"].format(layer) for layer in sorted(layers)] if resumed else []
        clean = CleanRun.of(model, tokens, [*keep, *streams], parts=parts)
        ends = [*streams[1:], last_hook(model)]
        resumed = resumed and all(
            _resumes(model, layer, clean.kept[begin][:1], end, clean.kept[end][:1])
            for layer, begin, end in zip(sorted(layers), streams, ends, strict=True)
        )
        return cls(clean, resumed, parts)

    def read(
        self, layer: int, hooks: Callable[[slice], Hooks], wanted: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> dict[str, Float[Tensor, "prompt *rest"]]:
        """Activations of runs that are patched in `layer`, and maybe in later ones.

        Args:
            hooks: the patches of some prompts, which are rows of the activations.
            wanted: by hook name, what is kept of an activation; runs end when all of them have been made.
        """
        kept: dict[str, list[Tensor]] = {name: [] for name in wanted}

        def keep(activation: Tensor, name: str) -> None:
            kept[name].append(wanted[name](activation))

        readers = {name: partial(keep, name=name) for name in wanted}
        model = self.clean.model
        for rows in self.parts:
            with running(model, hooks(rows)):
                if self.resumed:
                    stream = self.clean.kept[SITES["resid_pre"].format(layer)][rows]
                    serve(model, stream, readers, start_at_layer=layer)
                else:
                    watch(model, self.clean.tokens[rows], readers)
        return {name: torch.cat(each) for name, each in kept.items()}


def _resumes(
    model: LensModel,
    layer: int,
    stream: Float[Tensor, "1 pos d_model"],
    end: str,
    expected: Float[Tensor, "1 pos d_model"],
) -> bool:
    """Whether a run that begins at a layer comes to what the whole run has at a later place."""
    found: list[Tensor] = []
    try:
        watch_from(model, layer, stream, {end: found.append})
    except ValueError:
        return False
    return alike(found.pop(), expected)
