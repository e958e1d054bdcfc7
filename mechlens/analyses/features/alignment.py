"""Feature alignment: whether features of the same number have the same best tokens."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.arguments import check_type
from mechlens.results import CompleteSearch, FeatureAlignment

_STREAM = ("resid_post", "attn_out", "mlp_out")
"""Sites whose elements are those of the stream."""
_NO_TOKEN = -1
"""In the place of an id that does not excite its feature; so are smaller numbers."""


def feature_alignment(
    a: CompleteSearch, b: CompleteSearch | None = None, *, top_k: int | None = None
) -> FeatureAlignment:
    """Compare the best tokens of features with the same number, each layer of `a` with each layer of `b`.

    Beside each share stands what chance gives: the same share for features of unlike numbers. It is exact,
    over all pairs of them, and counts in that a few tokens excite many features. Features that no token
    excites (see `CompleteSearch.excites`), such as neurons at 0 for all of them, have no best token: they are
    left out for each pair of layers in one of which they have none.

    Args:
        a: a complete search.
        b: another one: of a larger model of the family, of the same model with random weights
            (`random_like`), with another prefix or site. None compares the layers of `a` with each other.
        top_k: how many of the best tokens the overlap is of; None takes as many as both searches have.

    Returns:
        Shares in [0, 1] by pair of layers and feature; `share()` has the mean with its interval and verdict.
        Compared are the features that both searches have; `to_dataframe()` says how many count.

    Raises:
        TypeError: anything but complete searches.
        ValueError: searches of different vocabularies, of sites that do not compare or of other directions,
            no feature in common, or a `top_k` that is not there.

    Source: Badger, "Language Model Features"; there by eye, on four features.
    Cost: for each pair of layers a comparison of `top_k` squared ids per feature; no model is run.
    """
    within, b = b is None, a if b is None else b
    check_type("a", a, CompleteSearch)
    check_type("b", b, CompleteSearch)
    _check(a, b)
    features = tuple(feature for feature in a.features if feature in set(b.features))
    if not features:
        raise ValueError(
            f"the searches have no feature in common: one has {_few(a.features)}, the other "
            f"{_few(b.features)}"
        )
    most = min(a.ids.shape[-1], b.ids.shape[-1])
    top_k = most if top_k is None else top_k
    if not 1 <= top_k <= most:
        raise ValueError(
            f"top_k must be from 1 to the {most} tokens that both searches kept, but is {top_k}: search with "
            "a larger top_k"
        )
    # what is no token is none of the other's, either
    mine, theirs = (_ids(each, features, top_k, no) for each, no in ((a, _NO_TOKEN), (b, _NO_TOKEN - 1)))
    excited, other_excited = (ids[..., 0] >= 0 for ids in (mine, theirs))
    compared = excited[:, None] & other_excited
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
        excited=excited,
        other_excited=other_excited,
        same=same,
        overlap=overlap.float().where(compared, torch.nan),
        chance_same=_chance(mine[..., :1], theirs[..., :1], same.double(), compared, d_vocab).float(),
        chance_overlap=_chance(mine, theirs, overlap, compared, d_vocab).float(),
        is_index=mine[..., 0] == index,
        other_is_index=theirs[..., 0] == index,
    )


def _check(a: CompleteSearch, b: CompleteSearch) -> None:
    if a.vocabulary != b.vocabulary or (a.vocabulary is None and a.model.d_vocab != b.model.d_vocab):
        raise ValueError(
            f"{a.model.name} and {b.model.name} have different vocabularies, so that their ids are different "
            "tokens: compare models with the same tokenizer"
        )
    for site, other in ((a.site, b.site), (b.site, a.site)):
        if site != other and site not in _STREAM:
            raise ValueError(
                f"features of {a.site} and {b.site} have nothing but their numbers in common: compare "
                f"searches of one of them, or of {', '.join(_STREAM)}"
            )
    if a.directions is not None and b.directions is not None and not torch.equal(a.directions, b.directions):
        raise ValueError(
            "the searches are of different directions, whose numbers have nothing in common: search both "
            "with the same ones"
        )


def _ids(
    search: CompleteSearch, features: tuple[int, ...], top_k: int, no_token: int
) -> Int[Tensor, "layer feature k"]:
    columns = {feature: column for column, feature in enumerate(search.features)}
    ids = search.ids.where(search.excites, no_token)
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
    """The mean share over pairs of features of unlike numbers: over all pairs, less those of like ones."""
    chance = torch.full(like.shape[:2], torch.nan, dtype=torch.double)
    for i, j in itertools.product(range(len(mine)), range(len(theirs))):
        counted = compared[i, j]
        n_features = int(counted.sum())
        if n_features < 2:
            continue
        # how many features have each token among their best
        counts, others = (
            ids[ids >= 0].bincount(minlength=d_vocab).double()
            for ids in (mine[i, counted], theirs[j, counted])
        )
        total = counts @ others / mine.shape[-1] - like[i, j, counted].sum()
        chance[i, j] = total / (n_features * (n_features - 1))
    return chance


def _few(features: tuple[int, ...]) -> str:
    return ", ".join(map(str, features[:5])) + (", ..." if len(features) > 5 else "")
