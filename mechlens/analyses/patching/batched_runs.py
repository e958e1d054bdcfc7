"""Patched runs of several prompts together, which go on from the prompts' one clean run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.models.protocol import LensModel, engine_of
from mechlens.models.run.forward import running, serve, watch, watch_from
from mechlens.models.run.patched_runs import SITES, TOKEN_BUDGET, row_charge
from mechlens.models.run.properties import alike
from mechlens.models.run.user_hooks import user_hooks

Hooks = Sequence[tuple[str, Callable[[Tensor, Any], Tensor]]]
"""By hook name, what is put there."""


@dataclasses.dataclass(frozen=True, eq=False)
class PatchedRuns:
    """Runs of some prompts that differ from the clean one from some layer on."""

    model: LensModel
    tokens: Int[Tensor, "prompt pos"]
    clean: Mapping[str, Float[Tensor, "prompt pos *rest"]]
    """What was kept of the clean run, by hook name."""
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
    ) -> PatchedRuns:
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
        may_resume = engine_of(model) == "HookedTransformer" and not hooked
        streams = [SITES["resid_pre"].format(layer) for layer in sorted(layers)] if may_resume else []
        ends = [SITES["resid_post"].format(model.cfg.n_layers - 1)] if may_resume else []
        kept: dict[str, list[Tensor]] = {name: [] for name in (*keep, *streams, *ends)}
        for rows in parts:
            watch(model, tokens[rows], {name: each.append for name, each in kept.items()})
        clean = {name: torch.cat(each) for name, each in kept.items()}
        resumed = may_resume and all(
            _resumes(model, layer, clean[begin][:1], end, clean[end][:1])
            for layer, begin, end in zip(sorted(layers), streams, [*streams[1:], *ends], strict=True)
        )
        return cls(model, tokens, clean, resumed, parts)

    def read(
        self,
        layer: int,
        hooks: Callable[[slice], Hooks],
        wanted: Mapping[str, Callable[[Tensor], Tensor]],
    ) -> dict[str, Float[Tensor, "prompt *rest"]]:
        """Activations of runs that are patched in `layer`, and maybe behind it.

        Args:
            hooks: the patches of some prompts, which are rows of the activations.
            wanted: by hook name, what is kept of an activation; runs end when they have had all.
        """
        kept: dict[str, list[Tensor]] = {name: [] for name in wanted}

        def keep(activation: Tensor, name: str) -> None:
            kept[name].append(wanted[name](activation))

        readers = {name: partial(keep, name=name) for name in wanted}
        for rows in self.parts:
            with running(self.model, hooks(rows)):
                if self.resumed:
                    stream = self.clean[SITES["resid_pre"].format(layer)][rows]
                    serve(self.model, stream, readers, start_at_layer=layer)
                else:
                    watch(self.model, self.tokens[rows], readers)
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
