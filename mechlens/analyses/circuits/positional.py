"""A head's attention from learned position embeddings alone."""

from __future__ import annotations

import torch
from einops import rearrange

from mechlens.analyses.circuits.factors import QUERY_KEY, check_head, make_circuit
from mechlens.arguments import check_model
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel
from mechlens.models.weights.access import norm_scale
from mechlens.models.weights.folding import folded_heads, position_vectors
from mechlens.models.weights.rotary import attention_scale, head_rotation
from mechlens.results import Circuit, PositionalAttention, head_label
from mechlens.results.heads import Head


def positional_QK(model: LensModel, head: Head, *, normalize: bool = False) -> Circuit:
    """How much a head prefers to attend from each position to each other, by position embeddings alone.

    Args:
        head: one head, such as `"L0H1"` or `(0, 1)`.
        normalize: divide each position's vector by its own scale, as the norm before attention would if
            nothing else were in the stream. This scale is usually far below 1, so without it the scores are
            far smaller than in the model.

    Returns:
        `W_pos @ W_Q @ W_K.T @ W_pos.T`, [query position, key position], n_ctx x n_ctx, before the attention
        scale and without a causal mask.

    Raises:
        TypeError: not one head.
        ValueError: the head is out of range, or the model has no learned positions.

    Example:
        >>> mechlens.positional_QK(model, "L0H1")
        Traceback (most recent call last):
        ValueError: this model has no learned positions (W_pos) but 'rotary': use QK with relative_position

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    Cost: all positions of the context once through the embedding.
    """
    layer, index = check_head(model, head)
    vectors = position_vectors(model)
    if normalize:
        vectors = vectors / rearrange(norm_scale(model, vectors), "pos -> pos 1")
    weights = folded_heads(model, layer)
    return make_circuit(
        model,
        (vectors @ weights.W_Q[index], (vectors @ weights.W_K[index]).T),
        f"positional QK of {head_label(layer, index)}",
        [(layer, index)],
        QUERY_KEY,
        space="positions",
        rotation=head_rotation(model, layer, None, None),
        normalized_positions=normalize,
    )


def positional_attention(
    model: LensModel, head: Head, *, n_positions: int | None = None, normalize: bool = True
) -> PositionalAttention:
    """How a head would attend if only learned positions were in the stream: softmax of `positional_QK`.

    The model's attention scale is included; biases, soft-caps and windows are not.

    Args:
        head: one head, such as `"L0H1"` or `(0, 1)`.
        n_positions: how many positions of the context to use, from the first; None is 64, or the whole
            context if that is less.
        normalize: divide each position's vector by its own scale, as the norm before attention would.

    Returns:
        A causal attention pattern [destination, source]; each row sums to 1.

    Raises:
        TypeError: not one head.
        ValueError: the head is out of range, the model has no learned positions, or `n_positions` is larger
            than the context.

    Example:
        >>> mechlens.positional_attention(model, "L0H1", n_positions=4)
        Traceback (most recent call last):
        ValueError: this model has no learned positions (W_pos) but 'rotary': use QK with relative_position

    Cost: two runs of two tokens up to the layer, and all positions of the context once through the embedding.
    """
    check_model(model)
    n_ctx = model.cfg.n_ctx
    if n_positions is None:
        n_positions = min(64, n_ctx)
    if not 1 <= n_positions <= n_ctx:
        raise ArgumentError("n_positions", f"between 1 and the context of {n_ctx}", n_positions)
    circuit = positional_QK(model, head, normalize=normalize)
    scale = attention_scale(model, circuit.heads[0][0])
    scores = scale * circuit.A[:n_positions] @ circuit.B[:, :n_positions]
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return PositionalAttention(
        model=circuit.model,
        head=circuit.heads[0],
        pattern=scores.masked_fill(later, -torch.inf).softmax(-1).cpu(),
        scale=scale,
        normalized_positions=normalize,
    )
