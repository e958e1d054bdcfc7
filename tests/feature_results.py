"""Results about features with values known by hand."""

from __future__ import annotations

import dataclasses

import torch

from mechlens.results import (
    ExhaustiveSearch,
    FeatureAlignment,
    FeatureExamples,
    GradientSearch,
    GreedySearch,
    ModelInfo,
)
from tests import hand_made

MARKUP = "</script><b>&lt;$x$"
STRINGS = {"0": "<s>", "5": " a", "6": "\n", "7": MARKUP, "8": "b"}


def own(name: str = "tiny") -> ModelInfo:
    return dataclasses.replace(hand_made.model(name, n_layers=4), processing=False)


def exhaustive(**changes) -> ExhaustiveSearch:
    """Layers 0, 2, 3, features 4, 1; feature 4 has ` a` first in two layers, feature 1 has none twice."""
    plain = ExhaustiveSearch(
        model=own(),
        site="resid_post",
        layers=(0, 2, 3),
        features=(4, 1),
        directions=None,
        prefix=torch.tensor([0]),
        prepend_bos=True,
        ids=torch.tensor([[[5, 6], [5, 8]], [[5, 8], [6, 5]], [[8, 5], [7, 5]]]),
        activations=torch.tensor(
            [[[2.0, 1.0], [3.0, 0.5]], [[4.0, 1.5], [5.0, 2.5]], [[6.0, 3.5], [-7.0, -8.0]]]
        ),
        lowest_ids=torch.tensor([[[8, 7], [8, 7]], [[8, 7], [8, 7]], [[8, 7], [6, 8]]]),
        lowest_activations=torch.full((3, 2, 2), -9.0),
        strings=STRINGS,
        vocabulary="0f1e2d3c4b5a",
    )
    return dataclasses.replace(plain, **changes)


def greedy(**changes) -> GreedySearch:
    """Two features of layer 2, two inputs of two tokens each."""
    plain = GreedySearch(
        model=own(),
        site="resid_post",
        layer=2,
        features=(4, 1),
        directions=None,
        prefix=torch.tensor([0]),
        prepend_bos=True,
        aggregate="sum",
        ids=torch.tensor([[[5, 6], [5, 8]], [[7, 8], [8, 8]]]),
        activations=torch.tensor([[[2.0, 3.0], [2.0, 1.5]], [[0.5, -0.25], [0.25, -0.5]]]),
        strings=STRINGS,
    )
    return dataclasses.replace(plain, **changes)


def gradient(**changes) -> GradientSearch:
    """Feature 3 at both of two tokens; three restarts, two steps; restart 1 decoded by `nearest` is best."""
    pinv, nearest = torch.tensor([[5, 5], [6, 5], [8, 8]]), torch.tensor([[6, 8], [5, 7], [8, 5]])
    plain = GradientSearch(
        model=own(),
        site="resid_post",
        layer=2,
        directions=None,
        selected=torch.tensor([[0, 3], [1, 3]]),
        prefix=torch.tensor([0]),
        prepend_bos=True,
        objective="mean",
        target_ids=None,
        constant=None,
        prior="norm",
        prior_weight=0.5,
        optimizer="Adam",
        learning_rate=0.125,
        isolated=False,
        seed=1,
        objectives=torch.tensor([[1.0, -2.0, -3.0], [0.5, -4.0, -4.5], [0.25, 0.0, -0.5]]),
        activations=torch.tensor([[-1.0, 2.0, 3.0], [-0.5, 4.0, 4.5], [-0.25, 0.0, 0.5]]),
        embeddings=torch.ones(3, 2, 8),
        nearest_cosine=torch.tensor([[0.5, 0.25], [0.75, 0.5], [0.125, 0.125]]),
        token_cosine=0.25,
        decoded_ids={"pinv": pinv, "nearest": nearest},
        ids={"pinv": pinv, "nearest": nearest},
        true_objectives={
            "pinv": torch.tensor([-1.0, -0.5, -0.25]),
            "nearest": torch.tensor([-0.5, -1.5, 0.0]),
        },
        true_activations={"pinv": torch.tensor([1.0, 0.5, 0.25]), "nearest": torch.tensor([0.5, 1.5, 0.0])},
        selected_activations={
            "pinv": torch.tensor([[1.5, 0.5], [0.5, 0.5], [0.5, 0.0]]),
            "nearest": torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 0.0]]),
        },
        optimum=None,
        strings=STRINGS,
    )
    return dataclasses.replace(plain, **changes)


def continuation() -> GradientSearch:
    """The same, searching for what the token `b` follows."""
    nan = {way: torch.full((3,), torch.nan) for way in ("pinv", "nearest")}
    return gradient(
        objective="continuation",
        selected=torch.zeros(0, 2, dtype=torch.long),
        target_ids=torch.tensor([8]),
        activations=torch.full((3, 3), torch.nan),
        true_activations=nan,
        selected_activations={way: torch.zeros(3, 0) for way in nan},
        true_objectives={"pinv": torch.tensor([3.0, 2.0, 1.0]), "nearest": torch.tensor([4.0, 0.5, 6.0])},
        objectives=torch.tensor([[1.0, 2.0, 3.0], [5.0, 4.0, 0.25], [7.0, 8.0, 9.0]]),
    )


def alignment(**changes) -> FeatureAlignment:
    """Layers 0 and 2 of one search, four features: 3 of them the same, by chance 1 in 8."""
    same = torch.tensor([True, True, True, False])
    plain = FeatureAlignment(
        model=own(),
        other=own(),
        within=True,
        site="resid_post",
        other_site="resid_post",
        layers=(0, 2),
        other_layers=(0, 2),
        features=(0, 1, 3, 4),
        top_k=2,
        prefix=torch.tensor([0]),
        other_prefix=torch.tensor([0]),
        activated=torch.ones(2, 4, dtype=torch.bool),
        other_activated=torch.ones(2, 4, dtype=torch.bool),
        same=torch.stack([torch.stack([same | True, same]), torch.stack([same, same | True])]),
        overlap=torch.tensor([[[1.0] * 4, [0.5, 0.5, 1.0, 0.5]], [[0.5, 0.5, 1.0, 0.5], [1.0] * 4]]),
        chance_same=torch.tensor([[0.0625, 0.125], [0.125, 0.25]]),
        chance_overlap=torch.tensor([[0.0625, 0.375], [0.375, 0.25]]),
        is_index=torch.tensor([[True, False, False, False]] * 2),
        other_is_index=torch.zeros(2, 4, dtype=torch.bool),
    )
    return dataclasses.replace(plain, **changes)


def untrained(**changes) -> FeatureAlignment:
    """Layers 0, 1, 2 of the model with layer 2 of another, where nothing is the same."""
    plain = alignment(
        other=own("<b>$other$"),
        within=False,
        layers=(0, 1, 2),
        other_layers=(2,),
        activated=torch.ones(3, 4, dtype=torch.bool),
        other_activated=torch.ones(1, 4, dtype=torch.bool),
        same=torch.zeros(3, 1, 4, dtype=torch.bool),
        overlap=torch.zeros(3, 1, 4),
        chance_same=torch.full((3, 1), 0.125),
        chance_overlap=torch.full((3, 1), 0.25),
        is_index=torch.zeros(3, 4, dtype=torch.bool),
        other_is_index=torch.ones(1, 4, dtype=torch.bool),
    )
    return dataclasses.replace(plain, **changes)


def examples(**changes) -> FeatureExamples:
    """Feature 2 of layer 1 in windows 7 and 3 of a corpus, after BOS; there was no third."""
    nan = torch.nan
    plain = FeatureExamples(
        model=own(),
        site="mlp_out",
        layers=(0, 1),
        features=(6, 2),
        directions=None,
        prepend_bos=True,
        read=9,
        numbers=torch.tensor([3, 7]),
        tokens=torch.tensor([[0, 5, 6], [0, 7, 8]]),
        windows=torch.tensor([[[-1] * 3, [-1] * 3], [[0, 1, -1], [1, 0, -1]]]),
        positions=torch.tensor([[[-1] * 3, [-1] * 3], [[1, 2, -1], [2, 1, -1]]]),
        activations=torch.tensor(
            [
                [[[nan] * 3] * 3] * 2,
                [
                    [[nan, 9.0, 8.0], [nan, 6.0, 7.0], [nan] * 3],
                    [[nan, -1.0, 2.123456], [nan, 1.5, 0.25], [nan] * 3],
                ],
            ]
        ),
        strings=STRINGS,
    )
    return dataclasses.replace(plain, **changes)


def sites(**changes) -> FeatureAlignment:
    """The same model's two layers at one site with these at another."""
    return alignment(within=False, site="attn_out", other_site="mlp_out", **changes)


def of_layers(size: int) -> FeatureAlignment:
    return alignment(
        layers=tuple(range(size)),
        other_layers=tuple(range(size)),
        activated=torch.ones(size, 4, dtype=torch.bool),
        other_activated=torch.ones(size, 4, dtype=torch.bool),
        same=torch.ones(size, size, 4, dtype=torch.bool),
        overlap=torch.ones(size, size, 4),
        chance_same=torch.zeros(size, size),
        chance_overlap=torch.zeros(size, size),
        is_index=torch.zeros(size, 4, dtype=torch.bool),
        other_is_index=torch.zeros(size, 4, dtype=torch.bool),
    )
