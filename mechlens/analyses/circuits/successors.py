"""Whether heads turn the tokens that they attend to into their successors, according to their weights."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch
from einops import einsum
from jaxtyping import Int
from torch import Tensor

from mechlens.analyses.circuits.factors import token_ids
from mechlens.arguments import check_model
from mechlens.errors import ArgumentError
from mechlens.measures.statistics import is_largest
from mechlens.models.protocol import LensModel, describe
from mechlens.models.weights.access import direct_unembedding
from mechlens.models.weights.folding import effective_embeddings, folded_heads
from mechlens.results import SuccessorScores
from mechlens.text.successions import SUCCESSIONS
from mechlens.text.task_prompts import is_one_token
from mechlens.text.tokens import target_id, token_strings


def successor_scores(
    model: LensModel, classes: Mapping[str, Sequence[str] | Int[Tensor, " token"]] | None = None
) -> SuccessorScores:
    """Score how often each head turns a token into its successor, by its weights alone.

    The effective embedding of a token (`W_E` plus the first MLP's output for it) goes through a head's OV
    circuit and the unembedding. A head that increments Monday makes the logit of Tuesday the largest of all
    days.

    Args:
        classes: by name, single tokens in order, as texts or ids, at least three. The first may be repeated
            at the end, which makes the class a cycle. None takes the paper's eight: numerals to 200, number
            words, ordinal words, days, months, abbreviated days and months, and letters, with a space before
            each. Those of their tokens that this model does not have are left out, and so are classes with
            fewer than two pairs of a token and its successor left.

    Returns:
        `.scores` `[layer, head]`, the share of the tokens with a successor for which it has the largest logit
        of its class; `.nulls`, the share for the successor of another token of the class, a mean over all
        others; both also by class.

    Raises:
        ValueError: a class that is too short or has a token twice, a text that is not one token, or no class
            is left.

    Example:
        >>> found = mechlens.successor_scores(model)
        >>> found.classes, found.scores.shape  # layer, head
        (('number words', 'letters'), torch.Size([4, 6]))

    References: Gould et al. 2023, "Successor Heads", arXiv:2312.09230. Their effective embedding leaves out
    `W_E`.
    Cost: no forward pass; 2 d_model squared per token and head.
    """
    check_model(model)
    info, every = describe(model), _classes(model, classes)
    ids, after = torch.cat([each.pairs for each in every.values()]).T
    embedded, unembedding = effective_embeddings(model, ids), direct_unembedding(model)
    sizes = [len(each.pairs) for each in every.values()]
    shape = (len(every), info.n_layers, info.n_heads)
    scores, nulls = (torch.empty(shape, dtype=torch.float32) for _ in range(2))
    for layer in range(info.n_layers):
        written = folded_heads(model, layer).written(embedded).split(sizes)
        for at, (each, some, n) in enumerate(zip(every.values(), written, sizes, strict=True)):
            logits = einsum(
                some, unembedding[:, each.members], "token head d_model, d_model member -> head token member"
            )
            # [head, token, token]: whether the first makes the second's successor the largest
            reached = is_largest(logits)[:, :, each.successor].float()
            own = reached.diagonal(dim1=1, dim2=2).sum(1)
            scores[at, layer] = own / n
            nulls[at, layer] = (reached.sum((1, 2)) - own) / (n * (n - 1))
    return SuccessorScores(
        model=info,
        classes=tuple(every),
        sizes=tuple(sizes),
        ids=ids,
        successor_ids=after,
        strings=tuple(token_strings(model, ids)),
        successor_strings=tuple(token_strings(model, after)),
        by_class=scores,
        null_by_class=nulls,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Class:
    """Tokens in a natural order."""

    members: Int[Tensor, " member"]
    pairs: Int[Tensor, "pair 2"]
    """Each token that has a successor, and its successor."""
    successor: Int[Tensor, " pair"]
    """The successors' places among the members."""


def _classes(
    model: LensModel, given: Mapping[str, Sequence[str] | Int[Tensor, " token"]] | None
) -> dict[str, _Class]:
    """The classes by name, checked."""
    if given is not None and not isinstance(given, Mapping):
        raise ArgumentError("classes", "tokens by the name of their class", given)
    ordered: dict[str, Sequence[int | None]]
    if given is None:
        # a token that this model does not have separates its neighbors
        ordered = {
            name: [target_id(model, word) if is_one_token(model, word) else None for word in words]
            for name, words in SUCCESSIONS.items()
        }
    else:
        ordered = {name: token_ids(model, "classes", tokens).tolist() for name, tokens in given.items()}
    found = {}
    for name, ids in ordered.items():
        pairs = [pair for pair in itertools.pairwise(ids) if None not in pair]
        first = [token for token, _ in pairs]
        if given is not None and (len(pairs) < 2 or len({*first}) < len(first) or ids[-1] in first[1:]):
            raise ArgumentError(
                "classes",
                "three or more tokens each, different but for the last, which may be the first",
                given,
            )
        if len(pairs) >= 2:
            members = torch.tensor(sorted({token for token in ids if token is not None}))
            both = torch.tensor(pairs)
            found[name] = _Class(members, both, torch.searchsorted(members, both[:, 1].contiguous()))
    if not found:
        raise ValueError(
            "no class has two tokens with their successors that are single tokens of this model: pass classes"
        )
    return found
