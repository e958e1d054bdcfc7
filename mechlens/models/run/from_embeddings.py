"""Runs from given token embeddings, so that embeddings can be optimized by gradient descent."""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.measures.memory import in_parts
from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import StopForward, run, running, watch
from mechlens.models.run.user_hooks import user_hooks

EMBED = "hook_embed"
_FIRST = "blocks.0.hook_resid_pre"


def token_embeddings(model: LensModel) -> Float[Tensor, "d_vocab d_model"]:
    """The embedding of every token without its position: `W_E`, scaled if the engine scales it (Gemma-2)."""

    def some(ids: Int[Tensor, "row 1"]) -> Float[Tensor, "row d_model"]:
        kept: list[Tensor] = []
        watch(model, ids, {EMBED: kept.append})
        return kept.pop()[:, 0]

    parts = in_parts(some, torch.arange(model.cfg.d_vocab)[:, None], 1024)
    # a copy, because tensors made in inference mode cannot have gradients
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
    """An activation, with its graph, of runs in which some token embeddings are replaced.

    Args:
        tokens: one sequence for all rows, or one per row.
        embedded: the embeddings to use from position `start` on.
        name: the hook point of the activation, where the run stops.
        alone: a layer that reads the first block's input, as if there were no blocks before it.

    Raises:
        ValueError: the user's hooks would act differently than on tokens, or the model never calls `name`.

    Cost: one forward pass up to `name`. On a bridge, `alone` also runs the earlier blocks and discards their
    results.
    """
    hooks = user_hooks(model)
    overwritten = [name for name in hooks if name.split(".")[0] in ("embed", EMBED)]
    if overwritten or (alone is not None and hooks):
        raise ValueError(
            f"your hook at {(overwritten or hooks)[0]} would act differently "
            f"{'on embeddings than on tokens' if overwritten else 'in an isolated block'}: remove it"
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
        raise ValueError(f"this model never calls the hook point {name!r}")
    return kept.pop()


def _replace(activation: Tensor, hook: Any, *, embedded: Tensor, start: int) -> Tensor:
    end = start + embedded.shape[1]
    return torch.cat([activation[:, :start], embedded, activation[:, end:]], dim=1)


def _keep(activation: Tensor, hook: Any, *, kept: list[Tensor]) -> None:
    kept.append(activation)
    raise StopForward
