"""Whether heads copy the tokens that they attend to, or suppress them, according to their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.circuits.factors import token_ids
from mechlens.arguments import check_counts, check_model
from mechlens.errors import ArgumentError
from mechlens.measures.statistics import is_largest
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.unembedding import soft_cap
from mechlens.models.weights.access import direct_unembedding
from mechlens.models.weights.folding import attention_scores, effective_embeddings, folded_heads, to_logits
from mechlens.results.copying import SHARES, CopyScores
from mechlens.text.task_library import MEN, WOMEN
from mechlens.text.task_prompts import one_token
from mechlens.text.tokens import token_strings


def copy_scores(
    model: LensModel, tokens: Sequence[str] | Int[Tensor, " token"] | None = None, *, top_k: int = 5
) -> CopyScores:
    """Score how often each head raises, or lowers, the very token that it attends to, by its weights alone.

    The effective embedding of a token (`W_E` plus the first MLP's output for it) goes through a head's OV
    circuit and the unembedding. A head copies a token if the token is then among the `top_k` largest logits,
    and suppresses it if it is among the `top_k` smallest.

    A head attends to the predicted token if it looks for what the stream predicts: the query is made from the
    token's unembedding as a residual stream (`W_U[:, token]` with the last norm's scale, minus the mean over
    the vocabulary), the keys from the effective embeddings of all given tokens, and the token's own key has
    the largest score. Positions are left out: none are added, and rotary models do not rotate. A head that
    suppresses and attends to the predicted token does copy suppression.

    Args:
        tokens: single tokens, as texts or ids; at least two. None takes the first names of the task `ioi`
            that are one token of this model.
        top_k: how many logits count.

    Returns:
        `.copies`, `.suppresses` and `.attends_to_predicted` `[layer, head]`, shares of the tokens, and the
        same shares for another of the tokens as their nulls. `.attends_to_predicted` is nan for models that
        normalize queries and keys differently in each head (Cohere) or across heads (OLMoE).

    Raises:
        ValueError: fewer than two tokens, a text that is not one token, or too few names.

    Example:
        >>> found = mechlens.copy_scores(model, [" sea", " man", " house"], top_k=50)
        >>> found.copies.shape
        torch.Size([4, 6])

    References: Wang et al. 2022, arXiv:2211.00593, the copy score of name movers (top 5) and of negative name
    movers; McDougall et al. 2023, "Copy Suppression", arXiv:2310.04625, who rank a token's own key for the
    query of its unembedding among the keys of the whole vocabulary.
    Cost: no forward pass; 2 d_model d_vocab per token and head.
    """
    check_model(model)
    check_counts(top_k=top_k)
    if tokens is None:
        tokens = one_token(model, sorted((*WOMEN, *MEN)), 2, "names")
    ids = token_ids(model, "tokens", tokens)
    if len(ids) < 2:
        raise ArgumentError("tokens", "at least two single tokens", tokens)
    info = describe(model)
    keys, own_key = ids.unique(return_inverse=True)
    offered = effective_embeddings(model, keys)
    embedded, predicting = offered[own_key], _predicting(model, ids)
    found = {
        f"{before}{name}": torch.empty(info.n_layers, info.n_heads, dtype=torch.float32)
        for name in SHARES
        for before in ("", "null_")
    }
    own = torch.arange(len(ids))
    for layer in range(info.n_layers):
        heads = folded_heads(model, layer)
        written = heads.written(embedded)
        scores = attention_scores(model, layer, heads, predicting, offered)
        looked_up = is_largest(scores).float().masked_fill(scores.isnan(), torch.nan)
        for before, others in (("", own), ("null_", own.roll(1))):
            found[f"{before}attends_to_predicted"][layer] = looked_up[:, own, own_key[others]].mean(1)
        for head in range(info.n_heads):
            logits = to_logits(model, written[:, head])
            for before, others in (("", own), ("null_", own.roll(1))):
                value = logits[own, ids[others].to(logits.device)][:, None]
                for name, beyond in (("copies", logits > value), ("suppresses", logits < value)):
                    share = (beyond.sum(1) < top_k).float().mean()
                    found[f"{before}{name}"][layer, head] = float(share)
    return CopyScores(model=info, ids=ids, strings=tuple(token_strings(model, ids)), top_k=top_k, **found)


def _predicting(model: LensModel, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
    """The direction of the stream that predicts each token."""
    unembedding = direct_unembedding(model)
    # the mean changes no prediction unless the logits have a soft-cap, and processing removes it
    mean = 0 if soft_cap(model) else unembedding.mean(1, keepdim=True)
    return (unembedding[:, ids] - mean).T
