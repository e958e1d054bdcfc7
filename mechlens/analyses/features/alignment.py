"""Feature alignment: whether features with the same index have the same best tokens."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.arguments import check_type
from mechlens.errors import ArgumentError
from mechlens.results import ExhaustiveSearch, FeatureAlignment
from mechlens.results.features import listed

_STREAM = ("resid_post", "attn_out", "mlp_out")
"""Sites whose dimensions are those of the residual stream."""
_NO_TOKEN = -1
"""This or a smaller number replaces an id that does not activate its feature."""


def feature_alignment(
    search: ExhaustiveSearch, other: ExhaustiveSearch | None = None, *, top_k: int | None = None
) -> FeatureAlignment:
    """Compare the best tokens of features with the same index in each pair of layers, in one search or two.

    A feature is a basis dimension of an activation, or a direction in the residual stream. Chance is the same
    share for features with different indices. It is exact, over all such pairs, so it accounts for tokens
    that activate many features. A feature that no token activates (see `ExhaustiveSearch.activates`), such as
    a neuron that is 0 for all of them, has no best token; pairs of layers in which this happens leave it out.

    Args:
        search: an exhaustive search.
        other: another search, such as one of a larger model of the family, of the same model with random
            weights, or with another prefix or site. None compares the layers of `search` with each other.
        top_k: how many of the best tokens to compare for the overlap; None is as many as both searches have.

    Returns:
        Shares in [0, 1] by pair of layers and feature, for the features that both searches have. `share()`
        gives the mean with its interval and verdict.

    Raises:
        TypeError: not exhaustive searches.
        ValueError: different vocabularies, sites that cannot be compared, different directions, no feature in
            common, or a larger `top_k` than both searches kept.

    Example:
        >>> search = mechlens.search_exhaustive(raw, mechlens.Features(indices=range(32)), top_k=2)
        >>> mechlens.feature_alignment(search).share().verdict
        'aligned'

    References: Badger, "Language Model Features", which compares four features by eye.
    Cost: `top_k`² comparisons of ids for each feature and pair of layers. No model is run.
    """
    a, within, b = search, other is None, search if other is None else other
    check_type("search", a, ExhaustiveSearch)
    check_type("other", b, ExhaustiveSearch)
    _check(a, b)
    features = tuple(feature for feature in a.features if feature in set(b.features))
    if not features:
        raise ValueError(
            f"the searches have no feature in common: one has {listed(a.features, 5)}, the other "
            f"{listed(b.features, 5)}"
        )
    most = min(a.ids.shape[-1], b.ids.shape[-1])
    top_k = most if top_k is None else top_k
    if not 1 <= top_k <= most:
        raise ArgumentError(
            "top_k",
            f"between 1 and {most}, the tokens that both searches kept",
            top_k,
            "search with a larger top_k",
        )
    # different placeholders, so two missing tokens never match
    mine, theirs = (_ids(each, features, top_k, no) for each, no in ((a, _NO_TOKEN), (b, _NO_TOKEN - 1)))
    activated, other_activated = (ids[..., 0] >= 0 for ids in (mine, theirs))
    compared = activated[:, None] & other_activated
    index = torch.tensor(features)
    same = mine[:, None, :, 0] == theirs[None, :, :, 0]
    overlap = torch.stack([_overlap(layer, theirs) for layer in mine])
    d_vocab = max(a.model.d_vocab, b.model.d_vocab)
    return FeatureAlignment(
        model=a.model,
        other=b.model,
        within=within,
        site=a.site,
        other_site=b.site,
        layers=a.layers,
        other_layers=b.layers,
        features=features,
        top_k=top_k,
        prefix=a.prefix.clone(),
        other_prefix=b.prefix.clone(),
        activated=activated,
        other_activated=other_activated,
        same=same,
        overlap=overlap.float().where(compared, torch.nan),
        chance_same=_chance(mine[..., :1], theirs[..., :1], same.double(), compared, d_vocab).float(),
        chance_overlap=_chance(mine, theirs, overlap, compared, d_vocab).float(),
        is_index=mine[..., 0] == index,
        other_is_index=theirs[..., 0] == index,
    )


def _check(a: ExhaustiveSearch, b: ExhaustiveSearch) -> None:
    if a.vocabulary != b.vocabulary or (a.vocabulary is None and a.model.d_vocab != b.model.d_vocab):
        raise ValueError(
            f"{a.model.name} and {b.model.name} have different vocabularies, so their ids are different "
            "tokens: compare models with the same tokenizer"
        )
    for site, other in ((a.site, b.site), (b.site, a.site)):
        if site != other and site not in _STREAM:
            raise ValueError(
                f"features of {a.site} and {b.site} share only their indices: compare "
                f"searches of one site, or of {', '.join(_STREAM)}"
            )
    if a.directions is not None and b.directions is not None and not torch.equal(a.directions, b.directions):
        raise ValueError(
            "the searches have different directions, so the same index means different features: run both "
            "with the same directions"
        )


def _ids(
    search: ExhaustiveSearch, features: tuple[int, ...], top_k: int, no_token: int
) -> Int[Tensor, "layer feature k"]:
    columns = {feature: column for column, feature in enumerate(search.features)}
    ids = search.ids.where(search.activates, no_token)
    return ids[:, [columns[feature] for feature in features], :top_k]


def _overlap(
    mine: Int[Tensor, "feature k"], theirs: Int[Tensor, "other_layer feature k"]
) -> Float[Tensor, "other_layer feature"]:
    common: Bool[Tensor, "other_layer feature k"] = (mine[..., :, None] == theirs[..., None, :]).any(-1)
    return common.double().mean(-1)


def _chance(
    mine: Int[Tensor, "layer feature k"],
    theirs: Int[Tensor, "other_layer feature k"],
    like: Float[Tensor, "layer other_layer feature"],
    compared: Bool[Tensor, "layer other_layer feature"],
    d_vocab: int,
) -> Float[Tensor, "layer other_layer"]:
    """The mean share over pairs of features with different indices."""
    chance = torch.full(like.shape[:2], torch.nan, dtype=torch.double)
    for i, j in itertools.product(range(len(mine)), range(len(theirs))):
        counted = compared[i, j]
        n_features = int(counted.sum())
        if n_features < 2:
            continue
        # for each token, how many features have it among their best
        counts, others = (
            ids[ids >= 0].bincount(minlength=d_vocab).double()
            for ids in (mine[i, counted], theirs[j, counted])
        )
        total = counts @ others / mine.shape[-1] - like[i, j, counted].sum()
        chance[i, j] = total / (n_features * (n_features - 1))
    return chance
