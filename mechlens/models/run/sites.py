"""Where a model can be patched: the names of the sites, and their hooks."""

from __future__ import annotations

from torch import Tensor

from mechlens.models.protocol import LensModel

SITES = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "q": "blocks.{}.attn.hook_q",
    "k": "blocks.{}.attn.hook_k",
    "v": "blocks.{}.attn.hook_v",
    "z": "blocks.{}.attn.hook_z",
    "attn_scores": "blocks.{}.attn.hook_attn_scores",
    "pattern": "blocks.{}.attn.hook_pattern",
}
NEURONS = "blocks.{}.mlp.hook_post"
"""The hook of an MLP's neurons, after the nonlinearity and, in a gated MLP, times the linear half."""
ATTENTION = ("pattern", "attn_scores")
"""The sites whose activations are `[batch, head, dest, src]`."""
PER_HEAD = ("q", "k", "v", "z", *ATTENTION)


def last_hook(model: LensModel) -> str:
    """The hook of the final residual stream, from which the logits are computed."""
    return SITES["resid_post"].format(model.cfg.n_layers - 1)


def by_position(activation: Tensor, site: str) -> Tensor:
    """`[batch, pos, ...]`; scores and patterns become `[batch, dest, head, src]`."""
    return activation.movedim(1, 2) if site in ATTENTION else activation
