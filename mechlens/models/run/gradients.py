"""Gradients of a number that a run's last residual gives, by activations along the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import Enough, run, running


def gradients(
    model: LensModel,
    tokens: Int[Tensor, "1 pos"],
    names: Sequence[str],
    number: Callable[[Float[Tensor, "1 pos d_model"]], Float[Tensor, ""]],
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Run once, forward and backward.

    Args:
        names: of hook points, such as `blocks.0.hook_mlp_out`.
        number: of the last `resid_post`, which the logits are read from.

    Returns:
        The number; by name, the activations `[1, pos, ...]` and the number's gradients by them, zero where
        it does not depend on them. The weights' own gradients are neither made nor touched.

    Raises:
        ValueError: the number has no gradient.
    """
    first = "blocks.0.hook_resid_pre"
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    kept: dict[str, Tensor] = {}

    # each hook gives back what it keeps, so that the rest of the run is made of that very tensor
    def keep(activation: Tensor, hook: Any, name: str) -> Tensor:
        # what comes before the stream needs no gradient, and frozen weights would begin none
        kept[name] = activation.detach().requires_grad_() if name == first else activation
        if name == last:
            raise Enough
        return kept[name]

    wanted = dict.fromkeys([first, *names, last])
    hooks = [(name, partial(keep, name=name)) for name in wanted]
    with running(model, hooks, gradients=True):
        # autograd takes no tensor that was made in inference mode, as the caller's may be
        run(model, tokens.clone())
        value = number(kept[last])
        if not value.requires_grad:
            raise ValueError(
                "the metric gives a number without a gradient by the logits: make it of differentiable "
                "tensor operations only (no argmax, comparison, .item() or .detach())"
            )
        # what comes before the stream has none
        reached = [name for name in names if kept[name].requires_grad]
        found = torch.autograd.grad(value, [kept[name] for name in reached], allow_unused=True)
    by_name = {name: torch.zeros_like(kept[name]) for name in names}
    by_name |= {name: each for name, each in zip(reached, found, strict=True) if each is not None}
    return value.detach(), {name: kept[name].detach() for name in names}, by_name
