"""Gradients of a metric with respect to activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import StopForward, run, running


def gradients(
    model: LensModel,
    tokens: Int[Tensor, "prompt pos"],
    names: Sequence[str],
    number: Callable[[Float[Tensor, "prompt pos d_model"]], Float[Tensor, ""]],
    *,
    begin: Float[Tensor, "prompt pos d_model"] | None = None,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Run the model forward and backward once.

    Args:
        names: hook points, such as `blocks.0.hook_mlp_out`.
        number: computes the metric from the last `resid_post`; of several prompts, the sum of theirs.
        begin: the stream that the first block reads; None is that of the tokens.

    Returns:
        The metric and, by hook point, the activations `[prompt, pos, ...]` and their gradients, which are
        zero where the metric does not depend on them. Weight gradients are neither computed nor changed.

    Raises:
        ValueError: the metric is not differentiable.
    """
    first = "blocks.0.hook_resid_pre"
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    kept: dict[str, Tensor] = {}

    # each hook returns the tensor it keeps, so that the rest of the run is computed from it
    def keep(activation: Tensor, hook: Any, name: str) -> Tensor:
        # start the graph at the stream: embeddings need no gradient, and weights may be frozen
        if name == first:
            activation = (activation if begin is None else begin.to(activation)).detach().requires_grad_()
        kept[name] = activation
        if name == last:
            raise StopForward
        return kept[name]

    wanted = dict.fromkeys([first, *names, last])
    hooks = [(name, partial(keep, name=name)) for name in wanted]
    with running(model, hooks, gradients=True):
        # a clone, because autograd rejects tensors made in inference mode
        run(model, tokens.clone())
        value = number(kept[last])
        if not value.requires_grad:
            raise ValueError(
                "the metric is not differentiable: compute it from the logits with differentiable tensor "
                "operations only (no argmax, comparison, .item() or .detach())"
            )
        # activations before the stream have no gradient
        reached = [name for name in names if kept[name].requires_grad]
        found = torch.autograd.grad(value, [kept[name] for name in reached], allow_unused=True)
    by_name = {name: torch.zeros_like(kept[name]) for name in names}
    by_name |= {name: each for name, each in zip(reached, found, strict=True) if each is not None}
    return value.detach(), {name: kept[name].detach() for name in names}, by_name
