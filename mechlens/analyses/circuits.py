"""Circuits from weights alone: what heads read, compare and write, as products of thin matrices.

Vectors are rows, as in TransformerLens: `OV = W_V @ W_O` is [source, destination] and `QK = W_Q @ W_K.T` is
[query, key]. The thin factors are never multiplied out: a token-by-token circuit of GPT-2 would be 10 GB.

What is in every circuit: the learned scale of the norms it goes through and, of LayerNorm, the subtraction
of the mean; weights that write to the stream have no mean where LayerNorm alone reads it; `W_U` has mean 0
over the vocabulary unless the logits have a soft-cap; the learned scale of a norm between attention and the
stream (Gemma-2). Models are so in every state: `processing=True`, `processing=False` and what a user
processed in part give the same circuit. What is not in it: all biases (of queries, keys, values, norms and
logits), the division that norms do, the attention scale, soft-caps, windows, constants by which a model
multiplies its logits (Cohere, Granite), and ALiBi's bonus for near keys, which is added to the scores
whatever the tokens are.

A rotary model turns queries and keys by their positions, so its QK circuits exist only for two positions a
known distance apart (`relative_position`), or for the part of each head that is not turned
(`rotary="unrotated"`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from numbers import Number
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.arguments import check_model
from mechlens.measures import composition
from mechlens.models.protocol import LensModel, describe
from mechlens.models.weights.access import norm_scale
from mechlens.models.weights.folding import (
    folded_heads,
    from_tokens,
    normalises_queries,
    position_vectors,
    to_logits,
)
from mechlens.models.weights.rotary import attention_scale, is_rotary, rotation, unrotated
from mechlens.progress import progress_bar
from mechlens.results import Circuit, CompositionScores, PositionalAttention, head_label, parse_head

EMBEDDINGS = ("W_E", "effective")
Head = str | tuple[int, int]
"""(layer, head), `L5H5` or `5.5`; of grouped-query models the query head."""


def OV(model: LensModel, heads: Head | Sequence[Head]) -> Circuit:
    """What a head writes to the stream at the destination of what is in the stream at the source.

    Args:
        heads: one, or several whose circuits are summed, with `inner` = their number times d_head.

    Returns:
        `W_V @ W_O`, [source, destination], d_model x d_model.

    Raises:
        TypeError: what is given is no head.
        ValueError: there is no such head.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; what is in a circuit and
    what is not is said at the top of this module.
    """
    read, write, asked = _values(model, heads)
    return _circuit(model, read, write, f"OV of {_names(asked)}", asked, ("source", "destination"))


def full_OV(model: LensModel, heads: Head | Sequence[Head], *, embedding: str = "W_E") -> Circuit:
    """What attending to each token adds to the logits of each token.

    Args:
        heads: one, or several whose circuits are summed: the effective OV circuit of heads that attend alike.
        embedding: `W_E`, or `effective`: `W_E` and the first MLP of it, which every later layer reads too.

    Returns:
        `W_E @ W_V @ W_O @ W_U`, [source token, destination token]. A destination is a next token.

    Raises:
        ValueError: there is no such head; `effective` of a model without MLPs.

    Source: Elhage et al. 2021; the effective embedding: Wang et al. 2022, arXiv:2211.00593, and others. Ours
    has the first MLP's biases, and neither attention nor positions in it.
    """
    read, write, asked = _values(model, heads)
    return _circuit(
        model,
        _of_tokens(model, read, embedding),
        to_logits(model, write),
        f"full OV of {_names(asked)}",
        asked,
        ("source", "destination"),
        embedding=embedding,
    )


def QK(
    model: LensModel, head: Head, *, relative_position: int | None = None, rotary: str | None = None
) -> Circuit:
    """How much a head's query at one place matches its key at another.

    Args:
        relative_position: of a rotary model: how many tokens the key comes before the query; 0 is the query's
            own place.
        rotary: `unrotated` takes the dimensions of the head that a rotary model does not rotate, where there
            are any (NeoX), and no others. Their part of a score is the same at every distance.

    Returns:
        `W_Q @ W_K.T`, [query, key], d_model x d_model, before the attention scale.

    Raises:
        TypeError: several heads, or what is no head.
        ValueError: there is no such head; a rotary model without either option, or another with one; a model
            that normalises queries and keys.

    Source: Elhage et al. 2021; what is in a circuit and what is not is said at the top of this module.
    Cost: of a rotary model on a bridge, one run of `relative_position + 1` tokens up to the layer.
    """
    layer, index = _head(model, head)
    weights = folded_heads(model, layer)
    turn = _turn(model, layer, relative_position, rotary)
    queries, keys = turn.of(weights.W_Q[index], weights.W_K[index])
    return _circuit(
        model,
        queries,
        keys.T,
        f"QK of {head_label(layer, index)}",
        [(layer, index)],
        ("query", "key"),
        turn=turn,
    )


def full_QK(
    model: LensModel,
    head: Head,
    *,
    embedding: str = "W_E",
    relative_position: int | None = None,
    rotary: str | None = None,
) -> Circuit:
    """How much a head at each token wants to attend to each token.

    Args:
        embedding: as for `full_OV`.
        relative_position: as for `QK`.
        rotary: as for `QK`.

    Returns:
        `W_E @ W_Q @ W_K.T @ W_E.T`, [query token, key token], before the attention scale.

    Raises:
        ValueError: as `QK`; `effective` of a model without MLPs.

    Source: Elhage et al. 2021.
    """
    layer, index = _head(model, head)
    weights = folded_heads(model, layer)
    turn = _turn(model, layer, relative_position, rotary)
    queries, keys = turn.of(weights.W_Q[index], weights.W_K[index])
    return _circuit(
        model,
        *_token_pair(model, queries, keys, embedding),
        f"full QK of {head_label(layer, index)}",
        [(layer, index)],
        ("query", "key"),
        embedding=embedding,
        turn=turn,
    )


def k_composition_circuit(
    model: LensModel,
    previous: Head,
    induction: Head,
    *,
    embedding: str = "W_E",
    relative_position: int | None = None,
    rotary: str | None = None,
) -> Circuit:
    """How much the induction head at each token wants to attend where the previous-token head brought each
    token.

    Args:
        previous: the earlier head, whose output the later one reads as its key.
        induction: the later head.
        embedding: as for `full_OV`, on both sides.
        relative_position: as for `QK`, of the induction head's query and key.
        rotary: as for `QK`.

    Returns:
        `(W_E @ W_Q) @ (W_E @ W_V @ W_O @ W_K).T`, [query token, key token], before the attention scale. A key
        token is the one that the earlier head attended to, not the one at the key's own place.

    Raises:
        ValueError: as `full_QK`; the earlier head is not in an earlier layer.

    Source: Elhage et al. 2021; `K_comp_full_circuit` of "How one can interpret GPT-2 small", which mixes
    two models.
    """
    one, other = head_pair(model, previous, induction)
    first, second = folded_heads(model, one[0]), folded_heads(model, other[0])
    turn = _turn(model, other[0], relative_position, rotary)
    queries, keys = turn.of(second.W_Q[other[1]], second.W_K[other[1]])
    return _circuit(
        model,
        *_token_pair(model, queries, first.W_V[one[1]] @ (first.W_O[one[1]] @ keys), embedding),
        f"K-composition of {_names([one])} with {_names([other])}",
        [one, other],
        ("query", "key"),
        embedding=embedding,
        turn=turn,
    )


def q_composition_circuit(
    model: LensModel,
    earlier: Head,
    later: Head,
    *,
    embedding: str = "W_E",
    relative_position: int | None = None,
    rotary: str | None = None,
) -> Circuit:
    """How much the later head, where the earlier one brought each token, wants to attend to each token.

    Args:
        earlier: the head whose output the later one reads as its query.
        later: the other.
        embedding: as for `full_OV`, on both sides.
        relative_position: as for `QK`, of the later head's query and key.
        rotary: as for `QK`.

    Returns:
        `(W_E @ W_V @ W_O @ W_Q) @ (W_E @ W_K).T`, [query token, key token], before the attention scale. A
        query token is the one that the earlier head attended to.

    Raises:
        ValueError: as `k_composition_circuit`.

    Source: Elhage et al. 2021.
    """
    one, other = head_pair(model, earlier, later)
    first, second = folded_heads(model, one[0]), folded_heads(model, other[0])
    turn = _turn(model, other[0], relative_position, rotary)
    queries, keys = turn.of(second.W_Q[other[1]], second.W_K[other[1]])
    return _circuit(
        model,
        *_token_pair(model, first.W_V[one[1]] @ (first.W_O[one[1]] @ queries), keys, embedding),
        f"Q-composition of {_names([one])} with {_names([other])}",
        [one, other],
        ("query", "key"),
        embedding=embedding,
        turn=turn,
    )


def v_composition_circuit(model: LensModel, earlier: Head, later: Head, *, embedding: str = "W_E") -> Circuit:
    """What the later head's moving of what the earlier one moved adds to the logits: a virtual head's OV.

    Args:
        earlier: the head whose output the later one reads as its value.
        later: the other.
        embedding: as for `full_OV`.

    Returns:
        `W_E @ W_V1 @ W_O1 @ W_V2 @ W_O2 @ W_U`, [source token, destination token].

    Raises:
        ValueError: the earlier head is not in an earlier layer; `effective` of a model without MLPs.

    Source: Elhage et al. 2021, "Virtual attention heads".
    """
    one, other = head_pair(model, earlier, later)
    first, second = folded_heads(model, one[0]), folded_heads(model, other[0])
    through = first.W_V[one[1]] @ (first.W_O[one[1]] @ second.W_V[other[1]])
    return _circuit(
        model,
        _of_tokens(model, through, embedding),
        to_logits(model, second.W_O[other[1]]),
        f"V-composition of {_names([one])} with {_names([other])}",
        [one, other],
        ("source", "destination"),
        embedding=embedding,
    )


def positional_QK(model: LensModel, head: Head, *, normalize: bool = False) -> Circuit:
    """How much a head at each position wants to attend to each position, by learned positions alone.

    Args:
        normalize: divide each position's vector by its own scale, as the norm before attention would if the
            vector were alone in the stream. Learned positions are short beside what else is in the stream,
            and not all equally long, so that without this the scores are far smaller than any the head
            makes. Sizes are comparable within one circuit either way.

    Returns:
        `W_pos @ W_Q @ W_K.T @ W_pos.T`, [query position, key position], n_ctx x n_ctx, before the attention
        scale. It is not causal.

    Raises:
        ValueError: there is no such head, or the model has no learned positions.
    """
    layer, index = _head(model, head)
    vectors = position_vectors(model)
    if normalize:
        vectors = vectors / norm_scale(model, vectors)[:, None]
    weights = folded_heads(model, layer)
    turn = _turn(model, layer, None, None)
    return _circuit(
        model,
        vectors @ weights.W_Q[index],
        (vectors @ weights.W_K[index]).T,
        f"positional QK of {head_label(layer, index)}",
        [(layer, index)],
        ("query", "key"),
        spaces=("positions", "positions"),
        turn=turn,
        normalized_positions=normalize,
    )


def positional_attention(
    model: LensModel, head: Head, *, n_positions: int | None = None, normalize: bool = True
) -> PositionalAttention:
    """How a head would attend if only learned positions were in the stream: the softmax of `positional_QK`.

    The model's own attention scale is in it; its biases, soft-caps and windows are not.

    Args:
        n_positions: how many positions there are, the first ones; None is 64, or the context if that is less.
        normalize: as for `positional_QK`.

    Raises:
        ValueError: as `positional_QK`; more positions than the context holds.

    Cost: two runs of two tokens up to the layer.
    """
    check_model(model)
    n_ctx = model.cfg.n_ctx
    if n_positions is None:
        n_positions = min(64, n_ctx)
    if not 1 <= n_positions <= n_ctx:
        raise ValueError(f"n_positions must be 1 to {n_ctx}, the model's context, but is {n_positions}")
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


def composition_scores(
    model: LensModel,
    kind: str,
    *,
    relative_position: int | None = None,
    seed: int = 0,
    draws: int = 100,
    progress: bool | None = None,
) -> CompositionScores:
    """How much of what each head reads could come from each earlier head, less what chance gives.

    With `OV = W_V @ W_O` of the earlier head and `QK = W_Q @ W_K.T` of the later one the score is
    `‖M1 @ M2‖ / (‖M1‖ ‖M2‖)`, Frobenius norms: `q` of OV and QK, `k` of OV and QK.T, `v` of OV and OV.
    What is in these is said at the top of this module.

    Args:
        kind: `q`, `k` or `v`.
        relative_position: of a rotary model and `q` or `k`: how far apart the later head's query and key are,
            as for `QK`. None takes the weights without their rotation there, as TransformerLens does; the
            result's `rotary` says so.
        seed: of the random weights that give the baseline.
        draws: pairs of random heads in the baseline.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        All pairs of an earlier and a later head; nan for all others.

    Raises:
        ValueError: another kind, a relative position where nothing is rotated, fewer than 2 draws, or a model
            that normalises queries and keys (for `q` and `k`).

    Source: Elhage et al. 2021, whose baseline this is. TransformerLens's `all_composition_scores` is 0 where
    ours is nan, and where a norm stands between attention and the stream (Gemma-2) leaves its scale out.
    Cost: float32 copies of all attention weights, and one product `[n_heads_total * d_head, d_model] @
    [d_model, n_heads_total * d_head]`; the baseline's is as `draws` heads against themselves.
    """
    if kind not in ("q", "k", "v"):
        raise ValueError(f"the kind of composition is 'q', 'k' or 'v', but is {kind!r}")
    info = describe(model)
    if kind == "v" and relative_position is not None:
        raise ValueError("V-composition compares no queries with keys: leave relative_position out")
    turn = _PLAIN
    factors = []
    layers_done = progress_bar(range(info.n_layers), desc="composition", unit="layer", progress=progress)
    for layer in layers_done:
        weights = folded_heads(model, layer)
        if kind == "v":
            later = weights.W_V, weights.W_O
        else:
            turn = _turn(model, layer, relative_position, None, may_ignore=True)
            queries, keys = turn.of(weights.W_Q, weights.W_K)
            later = (queries, keys.mT) if kind == "q" else (keys, queries.mT)
        factors.append((weights.W_V, weights.W_O, *later))
    A1, B1, A2, B2 = (torch.cat(parts) for parts in zip(*factors, strict=True))
    layers = torch.arange(info.n_layers, device=A1.device).repeat_interleave(info.n_heads)
    scores = composition.composition_scores(A1, B1, A2, B2, source_layers=layers, destination_layers=layers)
    mean, std = composition.random_composition(info.d_model, model.cfg.d_head, n=draws, seed=seed)
    return CompositionScores(
        model=info,
        kind=kind,
        scores=scores.cpu().view((info.n_layers, info.n_heads) * 2),
        baseline_mean=mean,
        baseline_std=std,
        baseline_draws=draws,
        seed=seed,
        rotary=turn.kind,
        relative_position=relative_position,
    )


# -- heads, and the ways in and out ----------------------------------------------------------------


def _head(model: LensModel, head: Head) -> tuple[int, int]:
    if isinstance(head, (list, tuple)) and any(isinstance(part, (str, list, tuple)) for part in head):
        raise TypeError(
            f"such a circuit is of one head, as 'L5H5' or (5, 5), but a list of heads is given: {head!r}"
        )
    check_model(model)
    layer, index = parse_head(head)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    if not (0 <= layer < n_layers and 0 <= index < n_heads):
        raise ValueError(
            f"there is no head {head_label(layer, index)}: the model has {n_layers} layers with {n_heads} "
            "heads each"
        )
    return layer, index


def head_pair(model: LensModel, earlier: Head, later: Head) -> tuple[tuple[int, int], tuple[int, int]]:
    """(layer, head) of two heads of which the later can read what the earlier writes.

    Raises:
        TypeError, ValueError: one is no head, or not there, or the first is not in an earlier layer.
    """
    one, other = _head(model, earlier), _head(model, later)
    if one[0] >= other[0]:
        raise ValueError(
            f"{head_label(*other)} reads only what layers before {other[0]} write, but {head_label(*one)} is "
            f"in layer {one[0]}: give the earlier head first"
        )
    return one, other


def _heads(model: LensModel, heads: Head | Sequence[Head]) -> list[tuple[int, int]]:
    try:
        several: list[Any] = [heads] if isinstance(heads, str) else list(heads)
    except TypeError:
        raise TypeError(
            f"heads are one or several, each as L5H5, 5.5 or (5, 5), but this is {heads!r}"
        ) from None
    # two numbers are one head
    if several and all(isinstance(part, Number) or getattr(part, "ndim", None) == 0 for part in several):
        several = [heads]
    asked = [_head(model, head) for head in several]
    if not asked or len(set(asked)) < len(asked):
        raise ValueError(f"heads must be one or several different ones, but are {heads!r}")
    return sorted(asked)


def _names(heads: Sequence[tuple[int, int]]) -> str:
    return " + ".join(head_label(*head) for head in heads)


def _values(
    model: LensModel, heads: Head | Sequence[Head]
) -> tuple[Float[Tensor, "d_model inner"], Float[Tensor, "inner d_model"], list[tuple[int, int]]]:
    """The values' weights of some heads side by side, and their outputs' below each other."""
    asked = _heads(model, heads)
    layers = {layer: folded_heads(model, layer) for layer, _ in asked}
    read = torch.cat([layers[layer].W_V[index] for layer, index in asked], dim=1)
    return read, torch.cat([layers[layer].W_O[index] for layer, index in asked]), asked


def _of_tokens(
    model: LensModel, reading: Float[Tensor, "d_model inner"], embedding: str
) -> Float[Tensor, "d_vocab inner"]:
    if embedding not in EMBEDDINGS:
        raise ValueError(f"embedding must be one of {', '.join(EMBEDDINGS)}, but is {embedding!r}")
    return from_tokens(model, reading, effective=embedding == "effective")


def _token_pair(
    model: LensModel,
    queries: Float[Tensor, "d_model inner"],
    keys: Float[Tensor, "d_model inner"],
    embedding: str,
) -> tuple[Float[Tensor, "d_vocab inner"], Float[Tensor, "inner d_vocab"]]:
    """Both factors from one way through the embedding."""
    both = _of_tokens(model, torch.cat([queries, keys], dim=1), embedding)
    A, B = both.split(queries.shape[1], dim=1)
    return A.contiguous(), B.T.contiguous()


# -- rotation --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Turn:
    """What the model's positions do to the weights of queries and keys."""

    kind: str
    relative_position: int | None
    of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """`W_Q` and `W_K`, `[..., d_model, d_head]`, as they meet."""


_PLAIN = _Turn("none", None, lambda W_Q, W_K: (W_Q, W_K))


def _turn(
    model: LensModel,
    layer: int,
    relative_position: int | None,
    rotary: str | None,
    *,
    may_ignore: bool = False,
) -> _Turn:
    if normalises_queries(model, layer):
        raise ValueError(
            "this model normalises queries and keys before it compares them, so that its QK circuits are no "
            "products of weights"
        )
    if rotary not in (None, "unrotated"):
        raise ValueError(f"rotary is None or 'unrotated', but is {rotary!r}")
    if not is_rotary(model):
        if relative_position is not None or rotary is not None:
            raise ValueError(
                "relative_position and rotary are for models that rotate queries and keys, but the positions "
                f"of this one are {model.cfg.positional_embedding_type!r}: leave them out"
            )
        return _PLAIN
    if may_ignore and relative_position is None:
        return dataclasses.replace(_PLAIN, kind="ignored")
    if (relative_position is None) == (rotary is None):
        given = "neither was given" if rotary is None else "both were given"
        raise ValueError(
            "this model rotates queries and keys by their positions, so that how they match depends on how "
            "far apart they are: give relative_position (how many tokens the key comes before the query) or "
            f"rotary='unrotated' (only the dimensions that are never rotated); {given}"
        )
    if relative_position is not None:
        R = rotation(model, layer, relative_position)
        return _Turn("relative", relative_position, lambda W_Q, W_K: (W_Q @ R, W_K))
    kept = list(unrotated(model, layer))
    if not kept:
        raise ValueError(
            f"this model rotates all {model.cfg.d_head} dimensions of its heads, so that how queries and "
            "keys match depends on how far apart they are: say how many tokens the key comes before the "
            "query (relative_position, on the command line --relative-position)"
        )
    return _Turn("unrotated", None, lambda W_Q, W_K: (W_Q[..., kept], W_K[..., kept]))


def _circuit(
    model: LensModel,
    A: Float[Tensor, "row inner"],
    B: Float[Tensor, "inner column"],
    name: str,
    heads: Sequence[tuple[int, int]],
    axes: tuple[str, str],
    *,
    spaces: tuple[str, str] | None = None,
    embedding: str = "none",
    turn: _Turn = _PLAIN,
    normalized_positions: bool = False,
) -> Circuit:
    if spaces is None:
        spaces = ("d_model", "d_model") if embedding == "none" else ("tokens", "tokens")
    return Circuit(
        model=describe(model),
        A=A.contiguous(),
        B=B.contiguous(),
        axes=axes,
        spaces=spaces,
        name=name,
        heads=tuple(heads),
        embedding=embedding,
        rotary=turn.kind,
        relative_position=turn.relative_position,
        normalized_positions=normalized_positions,
    )
