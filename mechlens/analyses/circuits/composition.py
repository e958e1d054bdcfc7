"""Composition of two heads: circuits through both, and scores for all pairs."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechlens.analyses.circuits.factors import (
    QUERY_KEY,
    SOURCE_DESTINATION,
    head_names,
    head_pair,
    make_circuit,
    read_token_pair,
    read_tokens,
)
from mechlens.errors import ArgumentError
from mechlens.measures import composition
from mechlens.models.protocol import LensModel, describe
from mechlens.models.weights.folding import folded_heads, to_logits
from mechlens.models.weights.rotary import NO_ROTATION, head_rotation
from mechlens.progress import progress_bar
from mechlens.results import Circuit, CompositionScores
from mechlens.results.heads import Head

KINDS = ("k", "q", "v")
"""The input of the later head that the earlier head writes: key, query or value."""


def k_composition_circuit(
    model: LensModel,
    earlier: Head,
    later: Head,
    *,
    embedding: str = "W_E",
    relative_position: int | None = None,
    rotary: str | None = None,
) -> Circuit:
    """How much the later head prefers to attend, from each token, to where the earlier head moved each token.

    With a previous-token head and an induction head, this is the induction circuit.

    Args:
        earlier: the head whose output the later one reads as its key, such as `"L1H2"` or `(1, 2)`.
        later: a head of a later layer.
        embedding: `W_E`, or `effective`: `W_E` plus the first layer's MLP applied to it. Used on both sides.
        relative_position: for a rotary model: how many positions the later head's key is before its query.
        rotary: for a rotary model: `unrotated` keeps only the dimensions that are not rotated.

    Returns:
        `(W_E @ W_Q) @ (W_E @ W_V @ W_O @ W_K).T`, [query token, key token], before the attention scale. The
        key token is the token that the earlier head attended to, not the token at the key's position.

    Raises:
        TypeError: `earlier` or `later` is not one head.
        ValueError: a head is out of range, or `earlier` is not in an earlier layer; a rotary model without
            `relative_position` or `rotary`, or another model with one of them; a model that normalizes
            queries and keys; `effective` for a model without MLPs.

    Example:
        >>> circuit = mechlens.k_composition_circuit(model, "L1H2", "L3H5", rotary="unrotated")
        >>> circuit.top_k_accuracy(1, "key") > 0.1
        True

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; `K_comp_full_circuit`
    in "How one can Interpret GPT2-Small".
    Cost: one pass of the vocabulary through the embedding and, with `effective`, the first MLP.
    """
    return _query_key_circuit(model, "k", earlier, later, embedding, relative_position, rotary)


def q_composition_circuit(
    model: LensModel,
    earlier: Head,
    later: Head,
    *,
    embedding: str = "W_E",
    relative_position: int | None = None,
    rotary: str | None = None,
) -> Circuit:
    """How much the later head prefers to attend, from where the earlier head moved each token, to each token.

    Args:
        earlier: the head whose output the later one reads as its query, such as `"L1H2"` or `(1, 2)`.
        later: a head of a later layer.
        embedding: `W_E`, or `effective`: `W_E` plus the first layer's MLP applied to it. Used on both sides.
        relative_position: for a rotary model: how many positions the later head's key is before its query.
        rotary: for a rotary model: `unrotated` keeps only the dimensions that are not rotated.

    Returns:
        `(W_E @ W_V @ W_O @ W_Q) @ (W_E @ W_K).T`, [query token, key token], before the attention scale. The
        query token is the token that the earlier head attended to.

    Raises:
        TypeError: `earlier` or `later` is not one head.
        ValueError: a head is out of range, or `earlier` is not in an earlier layer; a rotary model without
            `relative_position` or `rotary`, or another model with one of them; a model that normalizes
            queries and keys; `effective` for a model without MLPs.

    Example:
        >>> mechlens.q_composition_circuit(model, "L1H2", "L3H5", rotary="unrotated").name
        'Q-composition of L1H2 with L3H5'

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    Cost: one pass of the vocabulary through the embedding and, with `effective`, the first MLP.
    """
    return _query_key_circuit(model, "q", earlier, later, embedding, relative_position, rotary)


def v_composition_circuit(model: LensModel, earlier: Head, later: Head, *, embedding: str = "W_E") -> Circuit:
    """What two heads in series add to the logits: the OV circuit of a virtual attention head.

    Args:
        earlier: the head whose output the later one reads as its value, such as `"L1H2"` or `(1, 2)`.
        later: a head of a later layer.
        embedding: `W_E`, or `effective`: `W_E` plus the first layer's MLP applied to it.

    Returns:
        `W_E @ W_V1 @ W_O1 @ W_V2 @ W_O2 @ W_U`, [source token, destination token].

    Raises:
        TypeError: `earlier` or `later` is not one head.
        ValueError: a head is out of range, or `earlier` is not in an earlier layer; `effective` for a model
            without MLPs.

    Example:
        >>> mechlens.v_composition_circuit(model, "L1H2", "L3H5").axes
        ('source', 'destination')

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", "Virtual attention
    heads".
    Cost: one pass of the vocabulary through the embedding and, with `effective`, the first MLP.
    """
    pair = one, other = head_pair(model, earlier, later)
    second = folded_heads(model, other[0])
    factors = (
        read_tokens(model, _through(model, one, second.W_V[other[1]]), embedding),
        to_logits(model, second.W_O[other[1]]),
    )
    return make_circuit(model, factors, _name("v", pair), pair, SOURCE_DESTINATION, embedding=embedding)


def composition_scores(
    model: LensModel,
    kind: str,
    *,
    relative_position: int | None = None,
    seed: int = 0,
    draws: int = 100,
    progress: bool | None = None,
) -> CompositionScores:
    """How much of what each head reads could come from each earlier head, with a random baseline.

    With `OV = W_V @ W_O` of the earlier head and `QK = W_Q @ W_K.T` of the later one, the score is
    `‖M1 @ M2‖ / (‖M1‖ ‖M2‖)` in Frobenius norms: `q` from OV and QK, `k` from OV and QK.T, `v` from OV and
    OV.

    Args:
        kind: `q`, `k` or `v`: the later head's input.
        relative_position: for a rotary model and `q` or `k`: how many positions the later head's key is
            before its query. None leaves the rotation out, as TransformerLens does; the result's `rotary` is
            then `ignored`.
        seed: for the random weights of the baseline.
        draws: pairs of random heads in the baseline, at least 2.
        progress: show a progress bar; None shows one in a terminal and in Jupyter.

    Returns:
        Scores for all pairs of an earlier and a later head; nan for all other pairs.

    Raises:
        ValueError: an unknown kind; a relative position where nothing is rotated; fewer than 2 draws; a model
            that normalizes queries and keys (for `q` and `k`).

    Example:
        >>> mechlens.composition_scores(model, "k").summary(1)["earlier"].tolist()
        ['L1H1']

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", for scores and
    baseline. TransformerLens's `all_composition_scores` is 0 where ours is nan, and leaves out the scale of a
    norm between attention and the stream (Gemma-2).
    Cost: float32 copies of all attention weights, and one product `[n_heads_total * d_head, d_model] @
    [d_model, n_heads_total * d_head]`; the baseline costs the same with `draws` heads.
    """
    if kind not in KINDS:
        raise ArgumentError("kind", f"one of {', '.join(KINDS)}", kind)
    if kind == "v" and relative_position is not None:
        raise ArgumentError(
            "relative_position", "left out for V-composition", relative_position, "values are not rotated"
        )
    info = describe(model)
    rotation = NO_ROTATION
    factors = []
    for layer in progress_bar(range(info.n_layers), desc="composition", unit="layer", progress=progress):
        weights = folded_heads(model, layer)
        if kind == "v":
            later = weights.W_V, weights.W_O
        else:
            rotation = head_rotation(model, layer, relative_position, None, may_ignore=True)
            queries, keys = rotation.apply(weights.W_Q, weights.W_K)
            later = (queries, keys.mT) if kind == "q" else (keys, queries.mT)
        factors.append((weights.W_V, weights.W_O, *later))
    A1, B1, A2, B2 = (torch.cat(parts) for parts in zip(*factors, strict=True))
    layers = torch.arange(info.n_layers, device=A1.device).repeat_interleave(info.n_heads)
    scores = composition.composition_scores(A1, B1, A2, B2, source_layers=layers, destination_layers=layers)
    mean, std = composition.random_composition(info.d_model, model.cfg.d_head, n=draws, seed=seed)
    by_head = "(earlier earlier_head) (later later_head) -> earlier earlier_head later later_head"
    n = info.n_layers
    return CompositionScores(
        model=info,
        kind=kind,
        scores=rearrange(scores.cpu(), by_head, earlier=n, later=n),
        baseline_mean=mean,
        baseline_std=std,
        baseline_draws=draws,
        seed=seed,
        rotary=rotation.kind,
        relative_position=relative_position,
    )


def _query_key_circuit(
    model: LensModel,
    kind: str,
    earlier: Head,
    later: Head,
    embedding: str,
    relative_position: int | None,
    rotary: str | None,
) -> Circuit:
    """The later head's QK circuit, with keys (`k`) or queries (`q`) written by the earlier head."""
    pair = one, other = head_pair(model, earlier, later)
    second = folded_heads(model, other[0])
    rotation = head_rotation(model, other[0], relative_position, rotary)
    queries, keys = rotation.apply(second.W_Q[other[1]], second.W_K[other[1]])
    if kind == "k":
        keys = _through(model, one, keys)
    else:
        queries = _through(model, one, queries)
    factors = read_token_pair(model, queries, keys, embedding)
    return make_circuit(
        model, factors, _name(kind, pair), pair, QUERY_KEY, embedding=embedding, rotation=rotation
    )


def _through(
    model: LensModel, head: tuple[int, int], reading: Float[Tensor, "d_model inner"]
) -> Float[Tensor, "d_model inner"]:
    """What weights read from an earlier head's source: `W_V @ W_O @ reading`."""
    weights = folded_heads(model, head[0])
    # the thin product first
    return weights.W_V[head[1]] @ (weights.W_O[head[1]] @ reading)


def _name(kind: str, pair: tuple[tuple[int, int], tuple[int, int]]) -> str:
    return f"{kind.upper()}-composition of {head_names(pair[:1])} with {head_names(pair[1:])}"
