"""Weights as circuits want them: norms folded in and the stream's mean taken out, whatever a model's state.

Nothing here asks whether a model is processed. The learned scale of a norm is read off what the norm does,
ones where it is folded already, and to centre twice is to centre once: so the answer is the same on
`processing=True`, on `processing=False`, and on a model that its user processed in part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.forward import running, watch
from mechlens.models.run.unembedding import soft_cap
from mechlens.models.run.user_hooks import without_user_hooks
from mechlens.models.weights.access import attention_out_affine, final_norm_scale, norm_affine, output_weights

TOKENS_AT_ONCE = 1024
"""In one run of the first block: few enough for what its MLP makes of them to stay near the processor."""
EMBEDDED_AT_ONCE = 8192
"""In one run of the embedding alone, where most of a run's time is the engine's way to its hooks and back."""
# Their ln1 stands behind attention, so it is no part of what attention reads.
_NORM_BEHIND = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


@dataclasses.dataclass(frozen=True, eq=False)
class FoldedHeads:
    """A layer's attention weights, once per query head, in float32 and without biases.

    `W_Q`, `W_K` and `W_V` have the learned scale of the norm before them in their rows and, for LayerNorm,
    have mean 0 over d_model, since that norm subtracts the mean. `W_O` has mean 0 over d_model where all
    that reads the stream is LayerNorm. Where another norm stands between attention and the stream
    (Gemma-2), `W_O` has its learned scale in it; the engines' own `W_O` never has.
    """

    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "head d_model d_head"]
    W_V: Float[Tensor, "head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]


def folded_heads(model: LensModel, layer: int) -> FoldedHeads:
    """A layer's attention weights with its norms folded in; see `FoldedHeads`.

    Raises:
        ValueError: an architecture whose norms stand elsewhere.

    Cost: a copy of the layer's attention weights.
    """
    info = describe(model)
    if info.architecture in _NORM_BEHIND:
        raise ValueError(
            f"circuits of {info.architecture} are not supported: its norm stands behind attention, not before"
        )
    block = model.blocks[layer]
    scale, _ = norm_affine(getattr(block, "ln1", None), info.d_model, model)
    attention, n_heads = block.attn, info.n_heads

    def read(W: Float[Tensor, "kv d_model d_head"]) -> Float[Tensor, "head d_model d_head"]:
        wide = W.detach().float() * scale[:, None]
        if _is_layer_norm(model):
            wide = wide - wide.mean(-2, keepdim=True)
        # grouped-query models share keys and values among heads; a bridge has them once per group
        shared = n_heads // len(wide)
        return repeat(wide, "kv d_model d_head -> (kv shared) d_model d_head", shared=shared)

    W_O = output_weights(model, layer)
    behind = attention_out_affine(model, layer)
    if behind is not None:
        if _is_layer_norm(model):
            W_O = W_O - W_O.mean(-1, keepdim=True)
        W_O = W_O * behind[0]
    if is_blind_to_mean(model):
        W_O = W_O - W_O.mean(-1, keepdim=True)
    return FoldedHeads(read(attention.W_Q), read(attention.W_K), read(attention.W_V), W_O)


def normalises_queries(model: LensModel, layer: int) -> bool:
    """Whether a norm stands between `W_Q` or `W_K` and the scores (Qwen3, Gemma-3), so that these are no
    product of weights."""
    return getattr(model.blocks[layer].attn, "q_norm", None) is not None


def to_logits(model: LensModel, written: Float[Tensor, "inner d_model"]) -> Float[Tensor, "inner d_vocab"]:
    """What directions of the stream add to the logits, up to the division by the last norm's scale.

    The last norm's learned scale, its subtraction of the mean where it is LayerNorm, and `W_U` are in it.
    The mean over the vocabulary is taken out, as processing does and with the same exception: not where the
    logits have a soft-cap. The last norm's bias and `b_U` are not in it.

    Cost: one product with `W_U`; a narrower one than float32 is copied.
    """
    if is_blind_to_mean(model):
        written = written - written.mean(-1, keepdim=True)
    logits = (written * final_norm_scale(model)) @ model.W_U.detach().float()
    return logits if soft_cap(model) else logits - logits.mean(-1, keepdim=True)


def from_tokens(
    model: LensModel, reading: Float[Tensor, "d_model inner"], *, effective: bool = False
) -> Float[Tensor, "d_vocab inner"]:
    """What weights that read the stream read of each token of the vocabulary: `W_E @ reading`.

    Each token's row is the vector that enters the first block without any position, as the engine makes it;
    where the model scales its embedding (Gemma-2), the scale is in it. The mean of a row is left in, so
    `reading` must be centred where the model's norms are LayerNorm.

    Args:
        effective: add the first block's MLP of that vector (its own norm, biases and activation included,
            and no attention): the effective embedding.

    Raises:
        ValueError: the effective embedding of a model without MLPs.

    Cost: one product; effective, one run of the vocabulary through the first block's MLP.
    """
    with without_user_hooks(model):
        return torch.cat([rows.float() @ reading for rows in _embeddings(model, effective)])


def _embeddings(model: LensModel, effective: bool) -> Iterator[Float[Tensor, "some d_model"]]:
    """The rows that the first block gets, some at a time."""

    def none(activation: Tensor, hook: object) -> Tensor:
        return torch.zeros_like(activation)

    # sequences of one token, whose attention and position (where it is learned) are taken away
    hooks: list[tuple[str, Callable[..., Tensor]]] = []
    if has_learned_positions(model):
        hooks.append(("hook_pos_embed", none))
    names = ["blocks.0.hook_resid_pre"]
    if effective:
        if getattr(model.blocks[0], "mlp", None) is None:
            raise ValueError(
                "the effective embedding is W_E and the first MLP of it, but this model has no MLP: use "
                "embedding='W_E'"
            )
        hooks.append(("blocks.0.hook_attn_out", none))
        names.append("blocks.0.hook_mlp_out")
    at_once = TOKENS_AT_ONCE if effective else EMBEDDED_AT_ONCE
    for ids in torch.arange(model.cfg.d_vocab)[:, None].split(at_once):
        kept: list[Tensor] = []
        with running(model, hooks):
            watch(model, ids, dict.fromkeys(names, kept.append))
        yield sum(kept[1:], kept[0])[:, 0]


def has_learned_positions(model: LensModel) -> bool:
    """Whether a learned vector per position is added to the embedding."""
    return getattr(model.cfg, "positional_embedding_type", None) == "standard"


def position_vectors(model: LensModel) -> Float[Tensor, "pos d_model"]:
    """The learned vector of every position of the context, in float32.

    Raises:
        ValueError: the model has none.
    """
    if not has_learned_positions(model):
        kind = getattr(model.cfg, "positional_embedding_type", None)
        raise ValueError(
            "a positional circuit needs learned vectors of positions (W_pos), but this model's positions are "
            f"{kind!r}" + (": take QK at a relative_position" if kind == "rotary" else "")
        )
    kept: list[Tensor] = []
    with without_user_hooks(model):
        watch(model, torch.zeros(1, model.cfg.n_ctx, dtype=torch.long), {"hook_pos_embed": kept.append})
    return kept[0][0].float()


def _is_layer_norm(model: LensModel) -> bool:
    return (model.cfg.normalization_type or "").startswith("LN")


def is_blind_to_mean(model: LensModel) -> bool:
    """Whether nothing that reads the stream sees its mean, which processing takes out of what is written."""
    return _is_layer_norm(model) and not getattr(model.cfg, "final_rms", False)
