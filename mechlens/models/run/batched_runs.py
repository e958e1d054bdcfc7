"""Batched patched runs of several prompts, resumed from their clean run."""

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
"""(hook name, function that returns the patched activation)."""


@dataclasses.dataclass(frozen=True, eq=False)
class BatchedRuns:
    """Runs of some prompts that differ from their clean run from some layer on."""

    clean: CleanRun
    resumed: bool
    """Whether runs begin at the patched layer, from the clean stream; otherwise they are whole runs."""
    parts: Sequence[slice]
    """Which prompts run together."""

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

        Runs begin in the middle of the model if blocks can be called one by one and a test on the first
        prompt shows no difference. If the user has hooks, which may act on rows or layers, each prompt runs
        alone and whole.

        Args:
            layers: the layers that will be patched.
            keep: names of the hooks whose activations `clean` keeps.

        Cost: one forward pass of the prompts, and one of the first prompt from the first of `layers` on.
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
        """Activations of runs that are patched in `layer`, and maybe in later layers.

        Args:
            hooks: makes the patches for some prompts, which are the rows of the activations.
            wanted: by hook name, a function that returns what to keep of an activation. A run stops after the
                last of them.
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
    """Whether a run that begins at a layer gets the same activation at a later hook as the whole run."""
    found: list[Tensor] = []
    try:
        watch_from(model, layer, stream, {end: found.append})
    except ValueError:
        return False
    return alike(found.pop(), expected)
