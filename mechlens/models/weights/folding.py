"""Weights with norms folded in and the stream's mean removed, whether or not the model is processed.

A norm's learned scale is measured from what the norm does (ones if already folded), and centering twice is
the same as once. So processed, unprocessed and partly processed models give the same weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.forward import running, watch
from mechlens.models.run.unembedding import soft_cap
from mechlens.models.run.user_hooks import alone, without_user_hooks
from mechlens.models.weights.access import (
    attention_out_affine,
    final_norm_scale,
    norm_affine,
    norm_scale,
    output_weights,
    reading_bias,
)

TOKENS_AT_ONCE = 1024
"""Tokens in one run of the first block; few enough for the MLP's activations to stay in the cache."""
EMBEDDED_AT_ONCE = 8192
"""Tokens in one run of only the embedding, where most of the time is the engine's overhead."""
# their ln1 comes after attention
_NORM_AFTER = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")


@dataclasses.dataclass(frozen=True, eq=False)
class FoldedHeads:
    """A layer's attention weights, once per query head, in float32 and without biases.

    `W_Q`, `W_K` and `W_V` include the learned scale of the norm before attention. For LayerNorm they have
    mean 0 over d_model, since that norm subtracts the mean. `W_O` has mean 0 over d_model if only LayerNorms
    read the stream. It includes the learned scale of a norm between attention and the stream (Gemma-2), which
    the engines' own `W_O` does not.
    """

    W_Q: Float[Tensor, "head d_model d_head"]
    W_K: Float[Tensor, "head d_model d_head"]
    W_V: Float[Tensor, "head d_model d_head"]
    W_O: Float[Tensor, "head d_head d_model"]

    def written(self, source: Float[Tensor, "token d_model"]) -> Float[Tensor, "token head d_model"]:
        """What each head adds to the stream where it attends only to this source, up to the norms' scales."""
        read = einsum(source, self.W_V, "token d_model, head d_model d -> token head d")
        return einsum(read, self.W_O, "token head d, head d d_model -> token head d_model")


def folded_heads(model: LensModel, layer: int) -> FoldedHeads:
    """A layer's attention weights with its norms folded in.

    Raises:
        ValueError: an architecture whose norms come after attention.

    Cost: a copy of the layer's attention weights.
    """
    info = describe(model)
    if info.architecture in _NORM_AFTER:
        raise ValueError(
            f"circuits of {info.architecture} are not supported: its norm comes after attention, not before"
        )
    block = model.blocks[layer]
    scale, _ = norm_affine(getattr(block, "ln1", None), info.d_model, model)
    attention, n_heads = block.attn, info.n_heads

    def read(W: Float[Tensor, "kv d_model d_head"]) -> Float[Tensor, "head d_model d_head"]:
        wide = W.detach().float() * scale[:, None]
        if _is_layer_norm(model):
            wide = wide - wide.mean(-2, keepdim=True)
        # a bridge stores keys and values once per group of heads
        shared = n_heads // len(wide)
        return repeat(wide, "kv d_model d_head -> (kv shared) d_model d_head", shared=shared)

    W_O = output_weights(model, layer)
    after = attention_out_affine(model, layer)
    if after is not None:
        if _is_layer_norm(model):
            W_O = W_O - W_O.mean(-1, keepdim=True)
        W_O = W_O * after[0]
    if is_blind_to_mean(model):
        W_O = W_O - W_O.mean(-1, keepdim=True)
    return FoldedHeads(read(attention.W_Q), read(attention.W_K), read(attention.W_V), W_O)


def normalizes_queries(model: LensModel, layer: int) -> bool:
    """Whether a norm comes between `W_Q` or `W_K` and the scores (Qwen3, Gemma-3), so that the scores are not
    products of weights."""
    return getattr(model.blocks[layer].attn, "q_norm", None) is not None


def attention_scores(
    model: LensModel,
    layer: int,
    heads: FoldedHeads,
    queries: Float[Tensor, "query d_model"],
    keys: Float[Tensor, "key d_model"],
) -> Float[Tensor, "head query key"]:
    """Attention scores of vectors of the stream, without positions and before the scale and any soft-cap.

    Includes biases and all norms, also those of queries and keys (Qwen3, Gemma-3). Queries and keys are not
    rotated, as if each key were at its query's position.

    Args:
        heads: those of the layer.

    Returns:
        The scores; nan if a norm of queries or keys is not the same for each head (OLMoE, Cohere).
    """
    attention, sides = model.blocks[layer].attn, {}
    for name, W, stream in (("q", heads.W_Q, queries), ("k", heads.W_K, keys)):
        scaled = stream / norm_scale(model, stream)[:, None]
        read = einsum(scaled, W, "row d_model, head d_model d -> row head d")
        read = read + reading_bias(model, layer, name.upper())
        norm = getattr(attention, f"{name}_norm", None)
        if norm is not None:
            if any(parameter.numel() != W.shape[-1] for parameter in norm.parameters()):
                return W.new_full((len(W), len(queries), len(keys)), torch.nan)
            with alone(model), without_user_hooks(norm), torch.inference_mode():
                flat = norm(rearrange(read, "row head d -> (row head) d").to(attention.W_Q.dtype))
            read = flat.float().view_as(read)
        sides[name] = read
    return einsum(sides["q"], sides["k"], "query head d, key head d -> head query key")


def to_logits(model: LensModel, written: Float[Tensor, "inner d_model"]) -> Float[Tensor, "inner d_vocab"]:
    """What directions in the stream add to the logits, up to the division by the last norm's scale.

    Includes the last norm's learned scale, LayerNorm's subtraction of the mean, and `W_U`; excludes the last
    norm's bias and `b_U`. The mean over the vocabulary is subtracted unless the logits have a soft-cap, as in
    processing.

    Cost: one product with `W_U`, and a copy of it if its dtype is narrower than float32.
    """
    if is_blind_to_mean(model):
        written = written - written.mean(-1, keepdim=True)
    logits = (written * final_norm_scale(model)) @ model.W_U.detach().float()
    return logits if soft_cap(model) else logits - logits.mean(-1, keepdim=True)


def from_tokens(
    model: LensModel, reading: Float[Tensor, "d_model inner"], *, effective: bool = False
) -> Float[Tensor, "d_vocab inner"]:
    """What weights read from each token of the vocabulary: `W_E @ reading`.

    Each token's row is the vector that enters the first block, without its position. The engine computes it,
    so it includes any scaling of the embedding (Gemma-2). Rows are not centered, so `reading` must be if the
    model's norms are LayerNorms.

    Args:
        effective: use the effective embedding: add the first block's MLP output for that vector, with the
            MLP's norm, biases and activation function, but without attention.

    Raises:
        ValueError: the effective embedding of a model without MLPs.

    Cost: one product; with `effective`, also one run of the vocabulary through the first block's MLP.
    """
    with without_user_hooks(model):
        every = torch.arange(model.cfg.d_vocab)
        return torch.cat([rows.float() @ reading for rows in _embeddings(model, every, effective)])


def effective_embeddings(model: LensModel, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
    """The effective embedding of some tokens; `W_E` alone in a model without MLPs. See `from_tokens`."""
    has_mlps = getattr(model.blocks[0], "mlp", None) is not None
    with without_user_hooks(model):
        return torch.cat([rows.float() for rows in _embeddings(model, ids, has_mlps)])


def _embeddings(
    model: LensModel, ids: Int[Tensor, " token"], effective: bool
) -> Iterator[Float[Tensor, "some d_model"]]:
    """The rows that enter the first block, in batches."""

    def none(activation: Tensor, hook: object) -> Tensor:
        return torch.zeros_like(activation)

    # sequences of one token, without attention and learned positions
    hooks: list[tuple[str, Callable[..., Tensor]]] = []
    if has_learned_positions(model):
        hooks.append(("hook_pos_embed", none))
    names = ["blocks.0.hook_resid_pre"]
    if effective:
        if getattr(model.blocks[0], "mlp", None) is None:
            raise ValueError(
                "the effective embedding is W_E plus the first MLP's output for it, but this model has no "
                "MLP: use embedding='W_E'"
            )
        hooks.append(("blocks.0.hook_attn_out", none))
        names.append("blocks.0.hook_mlp_out")
    at_once = TOKENS_AT_ONCE if effective else EMBEDDED_AT_ONCE
    for some in ids[:, None].split(at_once):
        kept: list[Tensor] = []
        with running(model, hooks):
            watch(model, some, dict.fromkeys(names, kept.append))
        yield sum(kept[1:], kept[0])[:, 0]


def has_learned_positions(model: LensModel) -> bool:
    """Whether a learned vector for each position is added to the embedding."""
    return getattr(model.cfg, "positional_embedding_type", None) == "standard"


def position_vectors(model: LensModel) -> Float[Tensor, "pos d_model"]:
    """The learned vector of every position in the context, in float32.

    Raises:
        ValueError: the model has no learned positions.
    """
    if not has_learned_positions(model):
        kind = getattr(model.cfg, "positional_embedding_type", None)
        raise ValueError(
            f"this model has no learned positions (W_pos) but {kind!r}"
            + (": use QK with relative_position" if kind == "rotary" else "")
        )
    kept: list[Tensor] = []
    with without_user_hooks(model):
        watch(model, torch.zeros(1, model.cfg.n_ctx, dtype=torch.long), {"hook_pos_embed": kept.append})
    return kept[0][0].float()


def _is_layer_norm(model: LensModel) -> bool:
    return (model.cfg.normalization_type or "").startswith("LN")


def is_blind_to_mean(model: LensModel) -> bool:
    """Whether everything that reads the stream ignores its mean, which processing then removes from `W_O`."""
    return _is_layer_norm(model) and not getattr(model.cfg, "final_rms", False)
