"""Runs whose embeddings are given instead of looked up, so that they can be changed by gradients."""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.measures.memory import in_parts
from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import Enough, run, running, watch
from mechlens.models.run.user_hooks import user_hooks

EMBED = "hook_embed"
_FIRST = "blocks.0.hook_resid_pre"


def token_embeddings(model: LensModel) -> Float[Tensor, "d_vocab d_model"]:
    """What every token's embedding is, before anything is made of its position.

    That is `W_E`, scaled where the engine scales it (Gemma-2).
    """

    def some(ids: Int[Tensor, "row 1"]) -> Float[Tensor, "row d_model"]:
        kept: list[Tensor] = []
        watch(model, ids, {EMBED: kept.append})
        return kept.pop()[:, 0]

    parts = in_parts(some, torch.arange(model.cfg.d_vocab)[:, None], 1024)
    # a copy: what leaves inference mode can be computed with
    return torch.cat([made for _, made in parts]).clone()


def run_embedded(
    model: LensModel,
    tokens: Int[Tensor, "... pos"],
    embedded: Float[Tensor, "row some d_model"],
    start: int,
    name: str,
    *,
    alone: int | None = None,
) -> Float[Tensor, "row pos ..."]:
    """An activation of runs in which some tokens' embeddings are replaced, on the graph of these.

    Args:
        tokens: what every run, or each of them, reads, but for the positions from `start` on that are
            replaced.
        embedded: what comes there.
        name: of the hook point; the run ends there.
        alone: a layer that gets the first block's input, as if no blocks came before it.

    Cost: one forward pass up to `name`; on a bridge, `alone` runs the earlier blocks, too, and throws their
    work away.
    """

    hooks = user_hooks(model)
    overwritten = [name for name in hooks if name.split(".")[0] in ("embed", EMBED)]
    if overwritten or (alone is not None and hooks):
        raise ValueError(
            f"your hook at {(overwritten or hooks)[0]} would act otherwise on embeddings that are searched "
            f"{'in a block alone' if not overwritten else 'than on tokens'}: remove it"
        )
    replace = functools.partial(_replace, embedded=embedded, start=start)
    rows = tokens.expand(len(embedded), -1).clone()
    if alone is None:
        return _end_at(model, rows, name, [(EMBED, replace)])
    return _end_at(model, _end_at(model, rows, _FIRST, [(EMBED, replace)]), name, [], start_at_layer=alone)


def _end_at(model: LensModel, given: Tensor, name: str, hooks: list[Any], **options: Any) -> Tensor:
    kept: list[Tensor] = []
    with running(model, [*hooks, (name, functools.partial(_keep, kept=kept))], gradients=True):
        run(model, given, **options)
    if not kept:
        raise ValueError(f"this model makes nothing at the hook point {name!r}")
    return kept.pop()


def _replace(activation: Tensor, hook: Any, *, embedded: Tensor, start: int) -> Tensor:
    end = start + embedded.shape[1]
    return torch.cat([activation[:, :start], embedded, activation[:, end:]], dim=1)


def _keep(activation: Tensor, hook: Any, *, kept: list[Tensor]) -> None:
    kept.append(activation)
    raise Enough
