"""Weights as analyses want them: one shape on both engines."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.models.protocol import LensModel
from mechlens.models.runs import final_norm


def per_query_head(values: Float[Tensor, "*batch kv d"], n_heads: int) -> Float[Tensor, "*batch head d"]:
    """Keys or values once per query head: grouped-query models share one among several."""
    shared = n_heads // values.shape[-2]
    return values if shared == 1 else values.repeat_interleave(shared, dim=-2)


def value_bias(model: LensModel, layer: int) -> Float[Tensor, "head d_head"]:
    """`b_V` of a layer per query head; zeros where the model has no such bias."""
    attention = model.blocks[layer].attn
    bias = getattr(attention, "b_V", None)
    if bias is None:
        return model.W_O[layer].new_zeros(model.cfg.n_heads, model.cfg.d_head)
    return per_query_head(bias.reshape(-1, model.cfg.d_head), model.cfg.n_heads)


def final_norm_scale(model: LensModel) -> Float[Tensor, " d_model"]:
    """The learned scale of the last norm; ones where it is folded into `W_U` or there is no norm.

    It is read off what the norm does to a vector and its negative, because the engines name, offset
    (Gemma) and fold the parameter differently.
    """
    d_model = model.W_U.shape[0]
    probe = torch.linspace(1, 2, d_model, device=model.W_U.device)
    probe[1::2] *= -1
    probe -= probe.mean()
    probe /= probe.pow(2).mean().sqrt()
    with torch.inference_mode():
        up, down = (final_norm(model, x.to(model.W_U.dtype)[None, None])[0, 0].float() for x in (probe, -probe))
    return (up - down) / (2 * probe)


def direct_unembedding(model: LensModel) -> Float[Tensor, "d_model d_vocab"]:
    """What a direction of the residual stream adds to the logits, up to the final norm's scale.

    The last norm's learned scale, and LayerNorm's subtraction of the mean, are in it; its division
    by the vector's own scale, its bias and a soft-cap are not. The same on processed and unprocessed
    weights up to a constant over the vocabulary, which processing takes out.

    Cost: one copy of `W_U`, in float32.
    """
    W = final_norm_scale(model)[:, None] * model.W_U.float()
    if (model.cfg.normalization_type or "").startswith("LN"):
        W -= W.mean(0)
    return W.detach()
