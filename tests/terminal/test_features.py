"""Features in a terminal: nothing invisible, nothing wider than it, and what is left out is said."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from mechlens import terminal
from mechlens.results import CompleteSearch
from tests.results.test_results import (
    MODEL,
    complete_search,
    feature_alignment,
    feature_examples,
    gradient_search,
    greedy_search,
)


def many(n_features: int, *, top_k: int = 1, layers: int = 2) -> CompleteSearch:
    """A complete search: token `f` is best for feature `f` of layer `l`, at `f + (l + 1) / 4`."""
    number = torch.arange(n_features).expand(layers, n_features)
    ids = torch.stack([(number + rank) % n_features for rank in range(top_k)], dim=-1)
    value = number[..., None] + torch.arange(1, layers + 1)[:, None, None] / 4 - torch.arange(top_k)
    return CompleteSearch(
        model=dataclasses.replace(MODEL, processing=False),
        site="resid_post",
        layers=tuple(range(layers)),
        features=tuple(range(n_features)),
        directions=None,
        prefix=torch.tensor([], dtype=torch.long),
        prepend_bos=False,
        ids=ids,
        activations=value,
        lowest_ids=ids,
        lowest_activations=-value,
        strings={str(each): f"token{each}" for each in range(n_features)},
        vocabulary=None,
    )


def cells(out):
    """The rows of all tables, cell by cell."""
    rows = [line for line in out.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_features_stand_side_by_side_as_the_terminal_is_wide(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    terminal.print_complete_search(many(20))
    out = capsys.readouterr().out
    lines = out.splitlines()
    # the title is not broken, so that it can be searched for
    assert max(map(len, lines[1:])) <= width
    # one more would not have fitted
    table = max(len(line) for line in lines if line.startswith("┏"))
    column = len("│ token19 19.25 ")
    assert table + column > width
    assert re.findall(r"feature (\d+)", out) == [str(feature) for feature in range(20)]
    found = [cell.split() for row in cells(out) for cell in row[1:]]
    assert sorted(found) == sorted(
        [f"token{feature}", f"{feature + layer / 4:.2f}"] for feature in range(20) for layer in (1, 2)
    )


def test_ranks_stand_below_one_another(capsys):
    terminal.print_complete_search(many(2, top_k=2))
    assert cells(capsys.readouterr().out) == [
        ["0", "1", "token0  0.25", "token1  1.25"],
        ["", "2", "token1 -0.75", "token0  0.25"],
        ["1", "1", "token0  0.50", "token1  1.50"],
        ["", "2", "token1 -0.50", "token0  0.50"],
    ]


def test_a_token_that_excites_nothing_is_none(capsys):
    """A neuron that is at 0 or below for all tokens, or all others; of features only 0 itself is nothing."""
    values = torch.tensor([[[1.0, 0.0], [-0.0, -0.0], [-0.25, -0.5]]])
    search = dataclasses.replace(many(3, top_k=2, layers=1), activations=values, lowest_activations=values)
    terminal.print_complete_search(dataclasses.replace(search, site="post"))
    out = capsys.readouterr().out
    assert cells(out) == [
        ["0", "1", "token0  1.00", "—       0.00", "—      -0.25"],
        ["", "2", "—       0.00", "—       0.00", "—      -0.50"],
    ]
    assert "—: no token excites the neuron (2 of 3), or no other one does." in out
    terminal.print_complete_search(search)
    out = capsys.readouterr().out
    assert cells(out)[0] == ["0", "1", "token0  1.00", "—       0.00", "token2 -0.25"]
    assert "(1 of 3)" in out
    terminal.print_complete_search(many(3))
    assert "—" not in capsys.readouterr().out


def test_more_features_than_anyone_reads_are_left_to_files(capsys):
    terminal.print_complete_search(many(40))
    out = capsys.readouterr().out
    assert "feature 31" in out
    assert "feature 32" not in out
    assert "Shown: the first 32 of 40 features. --json and --out have all." in out
    assert len(terminal.complete_search_json(many(40))["tokens"]) == 40 * 2 * 2


def test_tokens_are_made_visible_and_their_site_is_named(capsys):
    terminal.print_complete_search(complete_search())
    out = capsys.readouterr().out
    assert "Tokens that excite neurons of the MLP in tiny most, behind <s>" in out
    assert "neuron 3" in out
    assert cells(out) == [["0", "·a 2.00", "⏎  1.00"]]


def test_the_json_of_a_complete_search_has_both_ends():
    found = json.loads(json.dumps(terminal.complete_search_json(complete_search())))
    assert found["prefix"] == [0]
    assert found["prepend_bos"] is True
    assert [(row["end"], row["feature"], row["token"]) for row in found["tokens"]] == [
        ("highest", 3, " a"),
        ("lowest", 3, "\n"),
        ("highest", 1, "\n"),
        ("lowest", 1, " a"),
    ]


def test_greedy_inputs_have_their_ranks_and_sums(capsys):
    terminal.print_greedy_search([greedy_search()])
    out = capsys.readouterr().out
    assert "Greedy search of 2 tokens that excite directions of resid_post in tiny, without BOS" in out
    assert cells(out) == [
        ["0", "0", "1", "·a ·a", "2.00 3.00", "5.00"],
        ["", "", "2", "·a ⏎", "2.00 1.50", "3.50"],
    ]
    assert "direction" in out


def test_what_is_ranked_by_the_last_token_needs_no_sum(capsys):
    single = dataclasses.replace(
        greedy_search(),
        aggregate="last",
        ids=greedy_search().ids[:, :1],
        activations=greedy_search().activations[:, :1],
    )
    terminal.print_greedy_search([single, dataclasses.replace(single, layer=1)])
    out = capsys.readouterr().out
    assert cells(out) == [["0", "0", "·a ·a", "2.00 3.00"], ["1", "0", "·a ·a", "2.00 3.00"]]
    assert "sum" not in out
    assert "rank" not in out
    found = terminal.greedy_search_json([single, dataclasses.replace(single, layer=1)])
    assert found["layers"] == [0, 1]
    assert [(row["layer"], row["id"]) for row in found["tokens"]] == [(0, 5), (0, 5), (1, 5), (1, 5)]


def test_a_gradient_search_stands_beside_real_embeddings(capsys):
    terminal.print_gradient_search(gradient_search())
    out = capsys.readouterr().out
    assert (
        "Gradient search in tiny, feature 3 of resid_post of layer 0, behind <s>; 1 step of Adam, "
        "prior norm x 0.5" in out
    )
    # the objective is minus the activation: of each decoding the lowest one
    assert cells(out) == [
        ["pseudo-inverse", "·a", "1.000", "1 of 2 restarts"],
        ["nearest embedding", "⏎", "1.500", "1 of 2 restarts"],
    ]
    # 0.5 and 0.75
    assert "to the nearest real one: 0.625 on average" in out
    assert "to the nearest other one: 0.250" in out
    assert "of all tokens" not in out


@pytest.mark.parametrize(
    ("optimum", "said"), [(1.51, "the search missed it by 0.010."), (1.5, "it was found.")]
)
def test_the_miss_is_printed(capsys, optimum, said):
    found = dataclasses.replace(gradient_search(), optimum=optimum)
    terminal.print_gradient_search(found)
    assert f"The best of all tokens has {optimum:.3f}: {said}" in capsys.readouterr().out
    # with the search that told it the token is named
    complete = dataclasses.replace(complete_search(), site="resid_post")
    terminal.print_gradient_search(found, complete)
    assert f"The best of all tokens (·a) has {optimum:.3f}: {said}" in capsys.readouterr().out


def test_the_best_token_was_found_whatever_the_weights_precision(capsys):
    # in bfloat16 the same token has 1.5 in one batch and 1.6 in another
    found = dataclasses.replace(gradient_search(), optimum=1.6)
    complete = dataclasses.replace(complete_search(), ids=torch.tensor([[[6], [5]]]))
    terminal.print_gradient_search(found, complete)
    assert "The best of all tokens (⏎) has 1.600: it was found." in capsys.readouterr().out


def test_a_continuation_is_told_by_its_log_probability(capsys):
    found = dataclasses.replace(
        gradient_search(),
        objective="continuation",
        target_ids=torch.tensor([5]),
        selected=torch.zeros(0, 2, dtype=torch.long),
        true_objectives={"pinv": torch.tensor([3.0, 2.0]), "nearest": torch.tensor([4.0, 5.0])},
        true_activations={way: torch.full((2,), torch.nan) for way in ("pinv", "nearest")},
        selected_activations={way: torch.zeros(2, 0) for way in ("pinv", "nearest")},
    )
    terminal.print_gradient_search(found)
    out = capsys.readouterr().out
    assert "log-probability (nats)" in out
    assert [row[1:3] for row in cells(out)] == [["⏎", "-2.000"], ["⏎", "-4.000"]]
    terminal.print_json(terminal.gradient_search_json(found))
    best = json.loads(capsys.readouterr().out)["best"]
    assert best["pinv"]["ids"] == [6]
    assert best["pinv"]["objective"] == 2
    assert best["pinv"]["activation"] is None


@pytest.mark.parametrize(
    ("n", "heading", "shown"),
    [(2, "each activation", ("4.00, 0.00", "0.00, 0.00")), (5, "smallest activation", ("0.00", "-1.00"))],
)
def test_several_features_stand_beside_their_mean(capsys, n, heading, shown):
    each = torch.zeros(2, n)
    each[0, 0] = 4
    found = dataclasses.replace(
        gradient_search(),
        selected=torch.tensor([[0, feature] for feature in range(n)]),
        selected_activations={"pinv": each, "nearest": each.flip(0) - (n > 4) * torch.eye(2, n)},
    )
    terminal.print_gradient_search(found)
    out = capsys.readouterr().out
    assert heading in out
    assert [(row[2], row[3]) for row in cells(out)] == [("1.000", shown[0]), ("1.500", shown[1])]
    least = dataclasses.replace(found, objective="maximin")
    terminal.print_gradient_search(least)
    # what the search is judged by
    assert [row[2] for row in cells(capsys.readouterr().out)] == ["1.000", "1.500"]


def test_of_a_neuron_that_no_token_excites_nothing_is_missed(capsys):
    complete = dataclasses.replace(complete_search(), activations=torch.tensor([[[0.0], [0.0]]]))
    terminal.print_gradient_search(dataclasses.replace(gradient_search(), optimum=0.0), complete)
    out = capsys.readouterr().out
    assert "No token excites it by itself." in out
    assert "missed" not in out
    assert "found." not in out


def test_the_json_of_a_gradient_search_has_every_restart():
    found = terminal.gradient_search_json(gradient_search())
    assert found["selected"] == [[0, 3]]
    assert found["best"]["nearest"] == {
        "ids": [6],
        "tokens": ["\n"],
        "embedding_decodes_to": [" a"],
        "objective": -1.5,
        "activation": 1.5,
        "activations": [1.5],
    }
    assert [row["activation"] for row in found["restarts"]] == [1.5, 1.0, 0.5, 0.25]


def test_alignment_stands_beside_chance_with_its_verdict(capsys):
    found = feature_alignment()
    across = dataclasses.replace(found, within=False, features=(0, 1, 3))
    terminal.print_feature_alignment({"layers": found, "models": across})
    out = capsys.readouterr().out
    rows = cells(out)
    share = found.share()
    assert rows[0] == ["layers", "0.667", f"{share.low:.3f} to {share.high:.3f}", "0.2500", share.verdict]
    # layers 0 and 2 with themselves in the other model: all the same
    assert rows[1][:2] == ["models", "1.000"]
    assert rows[1][3] == "0.0625"
    assert [row[:2] for row in rows[2:4]] == [["layers", "0.500"], ["models", "1.000"]]
    assert "The same tokens among the best 2" in out
    # of whose ids: `other` is only looked at where it is another model
    assert [row[:2] for row in rows[4:]] == [["tiny", "0.000"], ["other", "0.000"]]
    assert "by chance 1 in 9" in out
    assert "Of 3 features; chance is" in out


def test_sites_are_named_in_the_title_or_where_they_differ_in_the_rows(capsys):
    found = feature_alignment()
    terminal.print_feature_alignment({"layers": found})
    out = capsys.readouterr().out
    assert f"The same best token, {found.site} of tiny" in out
    assert cells(out)[0][0] == "layers"
    across = dataclasses.replace(found, within=False, site="attn_out", other_site="mlp_out")
    terminal.print_feature_alignment({"layers": found, "sites": across})
    out = capsys.readouterr().out
    assert "The same best token, tiny" in out
    assert [row[0] for row in cells(out)[:2]] == [f"layers, {found.site}", "sites, attn_out with mlp_out"]
    (_, told) = terminal.feature_alignment_json({"layers": found, "sites": across})["comparisons"]
    assert (told["site"], told["other_site"]) == ("attn_out", "mlp_out")


def test_of_one_feature_there_is_no_chance_to_explain(capsys):
    found = feature_alignment()
    alone = {
        name: getattr(found, name)[..., :1]
        for name in ("same", "overlap", "is_index", "other_is_index", "excited", "other_excited")
    }
    nothing = {
        name: torch.full_like(getattr(found, name), torch.nan) for name in ("chance_same", "chance_overlap")
    }
    terminal.print_feature_alignment(
        {"layers": dataclasses.replace(found, features=(0,), **alone, **nothing)}
    )
    out = capsys.readouterr().out
    assert cells(out)[0][3:] == ["", ""]
    assert "Of 1 feature: chance takes a second one, with another number." in out
    assert "the same share" not in out


def test_two_models_of_the_same_name_are_told_apart():
    found = dataclasses.replace(feature_alignment(), within=False)
    found = dataclasses.replace(found, other=found.model, other_is_index=torch.ones(2, 3, dtype=torch.bool))
    index = terminal.feature_alignment_json({"models": found})["is_index"]
    assert {name: (share["value"], share["verdict"]) for name, share in index.items()} == {
        "tiny": (0.0, "no more than chance"),
        "the other tiny": (1.0, "more than chance"),
    }


def test_layers_that_agree_more_are_said_to_by_their_intervals(capsys):
    found = feature_alignment()
    near = dataclasses.replace(found, same=torch.zeros(2, 2, 3, dtype=torch.bool))
    features = tuple(range(300))
    many = {
        name: getattr(found, name).repeat_interleave(100, -1)
        for name in ("same", "overlap", "is_index", "other_is_index", "excited", "other_excited")
    }
    many = dataclasses.replace(found, features=features, **many)
    far = dataclasses.replace(many, same=torch.zeros(2, 2, 300, dtype=torch.bool))
    terminal.print_feature_alignment({"layers, trained": found, "layers, random weights": near})
    out = capsys.readouterr().out
    # of three features each interval is wide
    assert out.endswith(
        "Layers have the same best token: trained 0.667, random weights 0.000 (the intervals overlap).\n"
    )
    across = dataclasses.replace(many, within=False)
    terminal.print_feature_alignment(
        {"layers, trained": many, "layers, random blocks": far, "x vs. y": across}
    )
    assert capsys.readouterr().out.endswith(
        "trained 0.667, random blocks 0.000 (the intervals do not overlap).\n"
    )
    terminal.print_feature_alignment({"layers": many, "x vs. y": across})
    assert "Layers have" not in capsys.readouterr().out


def test_of_one_layer_it_is_said_that_layers_are_not_compared(capsys):
    found = feature_alignment()
    sides = ("is_index", "other_is_index", "excited", "other_excited")
    one = {name: getattr(found, name)[:1] for name in sides}
    one |= {
        name: getattr(found, name)[:1, :1] for name in ("same", "overlap", "chance_same", "chance_overlap")
    }
    one = dataclasses.replace(found, within=False, layers=(2,), other_layers=(2,), **one)
    terminal.print_feature_alignment({"trained vs. random weights": one})
    said = "How layers agree with each other is left out, since there is but one"
    # the model has no other
    assert f"{said}." in capsys.readouterr().out
    deeper = dataclasses.replace(one, model=dataclasses.replace(one.model, n_layers=3))
    terminal.print_feature_alignment({"trained vs. random weights": deeper})
    assert f"{said}: give several with --layer." in capsys.readouterr().out
    terminal.print_feature_alignment({"x vs. y": dataclasses.replace(found, within=False)})
    assert said not in capsys.readouterr().out


def test_features_without_a_best_token_are_counted(capsys):
    excited = torch.tensor([[True, True, True], [True, False, False]])
    found = dataclasses.replace(feature_alignment(), excited=excited, other_excited=excited)
    terminal.print_feature_alignment({"layers": found})
    said = "Features that no token excites have no best token and are left out"
    assert f"{said}: 0 to 2 of 3 in a layer of tiny.\n" in capsys.readouterr().out
    told = terminal.feature_alignment_json({"layers": found})
    assert told["left_out_by_layer"] == {"tiny": [0, 2]}
    (compared,) = told["comparisons"]
    assert [row["features"] for row in compared["pairs"]] == [1]
    terminal.print_feature_alignment({"layers": feature_alignment()})
    assert "left out" not in capsys.readouterr().out


def test_a_share_that_is_undefined_is_no_number(capsys):
    found = feature_alignment()
    alone = dataclasses.replace(
        found,
        layers=(0,),
        other_layers=(0,),
        same=found.same[:1, :1],
        overlap=found.overlap[:1, :1],
        chance_same=found.chance_same[:1, :1],
        chance_overlap=found.chance_overlap[:1, :1],
        is_index=found.is_index[:1],
        other_is_index=found.other_is_index[:1],
        excited=found.excited[:1],
        other_excited=found.other_excited[:1],
    )
    terminal.print_feature_alignment({"layers": alone})
    assert cells(capsys.readouterr().out)[0] == ["layers", "undefined", "", "", ""]
    terminal.print_json(terminal.feature_alignment_json({"layers": alone}))
    (compared,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert compared["same"] == {"value": None, "low": None, "high": None, "chance": None, "verdict": ""}


def test_the_strongest_token_of_a_context_is_marked(capsys):
    terminal.print_feature_examples(feature_examples())
    out = capsys.readouterr().out
    assert (
        "Feature 2 of mlp_out of layer 0 in tiny: the strongest of 1 context of 3 tokens, which begin with "
        "BOS" in out
    )
    # there is no second window
    assert cells(out) == [["2.00", "<s>«·a»⏎"]]


def test_long_contexts_are_cut_around_the_token(capsys):
    found = feature_examples()
    length = 101
    activations = torch.zeros(1, 1, 2, length)
    activations[0, 0, 0, 50] = 7
    words = dataclasses.replace(
        found,
        tokens=torch.tensor([[5] * 50 + [6] + [7] * 50]),
        positions=torch.tensor([[[50, -1]]]),
        activations=activations,
        strings={"5": " a", "6": "\n", "7": "b c"},
    )
    terminal.print_feature_examples(words)
    # 32 characters before and 20 behind
    assert cells(capsys.readouterr().out) == [
        ["7.00", "…" + " a" * 16 + "«⏎»" + "b cb cb cb cb cb cb c"[:20] + "…"]
    ]


def test_more_places_than_anyone_reads_are_left_to_files(capsys):
    found = feature_examples()
    several = dataclasses.replace(
        found,
        features=tuple(range(20)),
        windows=found.windows.repeat(1, 20, 1),
        positions=found.positions.repeat(1, 20, 1),
        activations=found.activations.repeat(1, 20, 1, 1),
    )
    terminal.print_feature_examples(several)
    out = capsys.readouterr().out
    assert len(cells(out)) == 16
    assert "Shown: the first 16 of 20. --json and --out have all." in out
    contexts = terminal.feature_examples_json(several)["contexts"]
    assert len(contexts) == 20
    assert contexts[0]["text"] == "<s> a\n"
