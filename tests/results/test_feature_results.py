"""Tables, descriptions and verdicts of feature results."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mechlens.results.features import NO_TOKEN
from tests.examples import MARKUP, alignment, continuation, exhaustive, feature_examples, gradient, greedy


def test_an_exhaustive_search_has_a_row_per_end_and_rank():
    rows = [tuple(row) for row in exhaustive().to_dataframe().head(4).itertuples(index=False)]
    assert rows == [
        (0, 4, "highest", 1, 5, " a", 2.0),
        (0, 4, "highest", 2, 6, "\n", 1.0),
        (0, 4, "lowest", 1, 8, "b", -9.0),
        (0, 4, "lowest", 2, 7, MARKUP, -9.0),
    ]


def test_the_summary_shows_visible_tokens_and_inactive_features():
    rows = exhaustive().summary(99, layers=[3], features=[1, 4])
    assert rows.to_numpy().tolist() == [
        [3, 1, 1, MARKUP, -7.0, "⏎", -9.0],
        [3, 1, 2, "·a", -8.0, "b", -9.0],
        [3, 4, 1, "b", 6.0, "b", -9.0],
        [3, 4, 2, "·a", 3.5, MARKUP, -9.0],
    ]
    neurons = exhaustive(site="post")
    # a neuron at or below 0 for every token has no best token, but a lowest one
    assert neurons.summary(1, layers=[3], features=[1])["highest"].tolist() == [NO_TOKEN]
    assert neurons.column("feature").heading == neurons.noun == "neuron"
    with pytest.raises(ValueError, match="layer 1 was not searched: the search covers 0, 2, 3"):
        exhaustive().summary(layers=[1])


def test_the_beginning_of_inputs_in_words():
    assert exhaustive().begins == "after <s>"
    assert exhaustive(prefix=torch.tensor([], dtype=torch.long)).begins == "without BOS"


def test_a_greedy_search_is_ranked_by_its_aggregate():
    rows = [tuple(row) for row in greedy().to_dataframe().head(3).itertuples(index=False)]
    assert rows == [(2, 4, 1, 0, 5, " a", 2.0), (2, 4, 1, 1, 6, "\n", 3.0), (2, 4, 2, 0, 5, " a", 2.0)]
    assert greedy().scores.tolist() == [[5.0, 3.5], [0.25, -0.25]]
    assert greedy(aggregate="last").scores.tolist() == [[3.0, 1.5], [-0.25, -0.5]]
    assert greedy().summary(1).to_numpy().tolist() == [[2, 4, 1, "·a ⏎", "2.00 3.00", 5.0]]


def test_a_gradient_search_lists_the_best_first():
    result = gradient()
    table = result.to_dataframe()
    assert table["objective"].tolist() == [-1.5, -1.0, -0.5, -0.5, -0.25, 0.0]
    assert table.iloc[0].to_dict() == {
        "decoding": "nearest",
        "restart": 1,
        "ids": (5, 7),
        "tokens": f" a{MARKUP}",
        "objective": -1.5,
        "activation": 1.5,
        "smallest_activation": 1.0,
        "nearest_cosine": 0.625,
    }
    assert result.best_ids().tolist() == [5, 7]
    assert result.best_ids("pinv").tolist() == [5, 5]
    assert result.best_activation("pinv") == 1.0
    assert result.best_activations().tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="decoding must be one of pinv, nearest, got 'closest'"):
        result.best_ids("closest")
    rows = result.summary()[["decoding", "tokens", "found_by"]].to_numpy().tolist()
    assert rows == [
        ["pseudo-inverse", "·a ·a", "1 of 3 restarts"],
        ["nearest embedding", f"·a {MARKUP}", "1 of 3 restarts"],
    ]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, ""),
        ({"optimum": 1.51}, "The largest activation of all tokens is 1.510: the search missed it by 0.010."),
        ({"optimum": 1.5}, "The largest activation of all tokens is 1.500: the search found it."),
        ({"optimum": 0.0, "site": "post"}, "No token activates the neuron by itself."),
    ],
)
def test_the_verdict_compares_the_search_with_the_optimum(changes, verdict):
    assert gradient(**changes).verdict == verdict


def test_half_precision_does_not_turn_a_hit_into_a_miss():
    """In bfloat16, the same token can have 1.5 in one batch and 1.6 in another."""
    model = dataclasses.replace(gradient().model, dtype="bfloat16")
    assert gradient(optimum=1.6, model=model).verdict.endswith("the search found it.")
    assert gradient(optimum=2.5).below_optimum == 1.0
    assert gradient().below_optimum is None


@pytest.mark.parametrize(
    ("selected", "words"),
    [
        ([(0, 3)], "feature 3 at position 0"),
        ([(0, 3), (1, 3)], "feature 3 at every position"),
        ([(0, 3), (0, 5)], "features 3, 5 at position 0"),
        ([(0, 3), (1, 5)], "features 3, 5 at selected positions"),
        ([(pos, feature) for pos in (0, 1) for feature in range(6)], "6 features at every position"),
    ],
)
def test_the_search_in_words(selected, words):
    each = {way: torch.zeros(3, len(selected)) for way in ("pinv", "nearest")}
    assert gradient(selected=torch.tensor(selected), selected_activations=each).searched == words
    assert (
        gradient().title == "Gradient search in tiny for feature 3 at every position of resid_post of layer 2"
    )


def test_one_searched_token_needs_no_position():
    ids = {"pinv": torch.tensor([[5], [5], [8]])}
    one = gradient(
        site="post",
        selected=torch.tensor([[0, 3]]),
        embeddings=torch.ones(3, 1, 8),
        nearest_cosine=torch.ones(3, 1),
        decoded_ids=ids,
        ids=ids,
        selected_activations={"pinv": torch.zeros(3, 1)},
    )
    assert one.searched == "neuron 3"


def test_a_continuation_is_judged_by_its_log_probability():
    name, values, true = continuation().judged_by
    assert name == "log-probability (nats)"
    assert values[1].tolist() == [-5.0, -4.0, -0.25]
    assert true["nearest"].tolist() == [-4.0, -0.5, -6.0]
    assert continuation().searched == "the continuation b"
    unknown = dataclasses.replace(continuation(), target_ids=torch.tensor([8, 9]))
    assert unknown.searched == "the continuation of the ids 8, 9"


def test_several_features_are_judged_by_the_objective():
    assert gradient().judged_by[0] == "activation (mean)"
    name, values, _ = gradient(objective="min").judged_by
    assert name == "smallest activation"
    assert values[1].tolist() == [-0.5, 4.0, 4.5]
    name, values, _ = gradient(objective="l1", target_ids=torch.tensor([5, 6])).judged_by
    assert name == "L1 distance to the target's activations"
    assert values[1].tolist() == [0.5, -4.0, -4.5]


def test_examples_are_cut_around_their_largest_token():
    table = feature_examples().summary(99)
    assert table[["layer", "feature", "rank", "window", "context"]].to_numpy().tolist() == [
        [1, 6, 1, 3, "<s>«·a»⏎"],
        [1, 6, 2, 7, f"<s>{MARKUP}«b»"],
        [1, 2, 1, 7, f"<s>{MARKUP}«b»"],
        [1, 2, 2, 3, "<s>«·a»⏎"],
    ]
    ids = torch.tensor([[5] * 50 + [6] + [8] * 50, [0] * 101])
    long = feature_examples(tokens=ids, activations=torch.zeros(2, 2, 3, 101))
    assert long.context(0, 50) == "…" + " a" * 16 + "«⏎»" + "b" * 20 + "…"
    with pytest.raises(ValueError, match="layer 2 was not searched"):
        feature_examples().at(2, 2)


def test_the_json_of_an_alignment_has_its_shares():
    found = alignment().to_json()["shares"]
    assert found["same"]["value"] == 0.75
    assert found["same"]["verdict"] == "aligned"
    assert found["is_index"]["value"] == 0.25
