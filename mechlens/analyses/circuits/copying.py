"""Whether heads copy the tokens that they attend to, or suppress them, according to their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum
from jaxtyping import Int
from torch import Tensor

from mechlens.arguments import check_counts, check_model
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel, describe
from mechlens.models.weights.folding import effective_embeddings, folded_heads, to_logits
from mechlens.results.copying import CopyScores
from mechlens.text.task_library import MEN, WOMEN
from mechlens.text.task_prompts import one_token
from mechlens.text.tokens import target_id, token_strings


def copy_scores(
    model: LensModel, tokens: Sequence[str] | Int[Tensor, " token"] | None = None, *, top_k: int = 5
) -> CopyScores:
    """Score how often each head raises, or lowers, the very token that it attends to, by its weights alone.

    The effective embedding of a token (`W_E` plus the first MLP's output for it) goes through a head's OV
    circuit and the unembedding. A head copies a token if the token is then among the `top_k` largest logits,
    and suppresses it if it is among the `top_k` smallest.

    Args:
        tokens: single tokens, as texts or ids; at least two. None takes the first names of the task `ioi`
            that are one token of this model.
        top_k: how many logits count.

    Returns:
        `.copies` and `.suppresses` `[layer, head]`, shares of the tokens, and the same shares for another of
        the tokens as their nulls.

    Raises:
        ValueError: fewer than two tokens, a text that is not one token, or too few names.

    Example:
        >>> found = mechlens.copy_scores(model, [" sea", " man", " house"], top_k=50)
        >>> found.copies.shape
        torch.Size([4, 6])

    References: Wang et al. 2022, arXiv:2211.00593, the copy score of name movers (top 5) and of negative name
    movers; McDougall et al. 2023, "Copy Suppression", arXiv:2310.04625.
    Cost: no forward pass; 2 d_model d_vocab per token and head.
    """
    check_model(model)
    check_counts(top_k=top_k)
    if tokens is None:
        tokens = one_token(model, sorted((*WOMEN, *MEN)), 2, "names")
    ids = torch.tensor(
        [each if isinstance(each, int) else target_id(model, each) for each in _listed(tokens)]
    )
    if len(ids) < 2:
        raise ArgumentError("tokens", "at least two single tokens", tokens)
    info = describe(model)
    embedded = effective_embeddings(model, ids)
    found = {name: torch.empty(info.n_layers, info.n_heads, dtype=torch.float32) for name in _SHARES}
    own = torch.arange(len(ids))
    for layer in range(info.n_layers):
        heads = folded_heads(model, layer)
        read = einsum(embedded, heads.W_V, "token d_model, head d_model d -> token head d")
        written = einsum(read, heads.W_O, "token head d, head d d_model -> token head d_model")
        for head in range(info.n_heads):
            logits = to_logits(model, written[:, head])
            for before, others in (("", own), ("null_", own.roll(1))):
                value = logits[own, ids[others].to(logits.device)][:, None]
                for name, beyond in (("copies", logits > value), ("suppresses", logits < value)):
                    share = (beyond.sum(1) < top_k).float().mean()
                    found[f"{before}{name}"][layer, head] = float(share)
    return CopyScores(model=info, ids=ids, strings=tuple(token_strings(model, ids)), top_k=top_k, **found)


_SHARES = ("copies", "suppresses", "null_copies", "null_suppresses")


def _listed(tokens: Sequence[str] | Tensor) -> list[str | int]:
    if isinstance(tokens, str):
        raise ArgumentError("tokens", "a list of single tokens", tokens)
    return tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
