"""A page's sections on features say what their results hold."""

from __future__ import annotations

import pytest
import torch

from mechlens.plots.style import MINUS
from mechlens.report import (
    Interactive,
    Plot,
    Section,
    Table,
    complete_search_section,
    feature_alignment_section,
    feature_examples_section,
    gradient_search_section,
    greedy_search_section,
    render_report,
)
from tests.plots.test_features import (
    MARKUP,
    alignment,
    complete,
    continuation,
    examples,
    gradient,
    greedy,
    own,
    untrained,
)


def page(section: Section) -> str:
    return render_report(title="Features", model=own(), comparisons=None, sections=[section])


def test_a_complete_search_has_its_picture_and_its_table():
    section = complete_search_section(complete(), layers=[0, 3], text="What to look for.")
    picture, table = section.parts
    assert isinstance(picture, Plot)
    assert list(picture.figure.data[0].text[0]) == ["·a", "·a"]
    assert "feature 4 of layer 3: b" in picture.description
    assert isinstance(table, Table)
    assert table.columns == ("layer", "feature", "highest", "activation", "lowest", "activation")
    assert table.rows == [
        (0, 4, "·a", 2.0, "b", -9.0),
        (0, 1, "·a", 3.0, "b", -9.0),
        (3, 4, "b", 6.0, "b", -9.0),
        (3, 1, MARKUP, -7.0, "⏎", -9.0),
    ]
    assert section.text == (
        "What to look for.\n\nThe activation of every feature of resid_post was computed for each of the 64 "
        "tokens, behind <s>: 2 features in 3 layers."
    )
    assert {"Feature", "Complete search"} <= set(section.terms)
    assert "<b>&lt;$x$" not in page(section)
    neurons = complete_search_section(complete(site="post"))
    assert neurons.parts[1].columns[1] == "neuron"
    assert "Neuron" in neurons.terms
    assert "The activation of every neuron of the MLP was computed" in neurons.text
    assert (
        "behind <s>: 1 feature in 1 layer."
        in complete_search_section(
            complete(
                layers=(0,),
                features=(4,),
                **{
                    name: getattr(complete(), name)[:1, :1]
                    for name in ("ids", "activations", "lowest_ids", "lowest_activations")
                },
            )
        ).text
    )
    with pytest.raises(ValueError, match="feature 7 was not searched"):
        complete_search_section(complete(), features=[7])


def test_greedy_searches_are_a_table_of_layers_and_features():
    deeper = greedy(layer=3, features=(4, 9), activations=greedy().activations + 1)
    section = greedy_search_section([greedy(), deeper])
    inputs, activations = section.parts
    assert inputs.columns == ("layer", "feature 4", "feature 1", "feature 9")
    # a blank parts two tokens, since a blank of theirs is a dot
    assert inputs.rows == [(2, "·a ⏎", MARKUP + " b", None), (3, "·a ⏎", None, MARKUP + " b")]
    assert activations.columns == ("layer", "feature", "input", "activation at each token", "score")
    assert activations.rows[1] == (2, 1, MARKUP + " b", f"{MARKUP} 0.50, b {MINUS}0.25", 0.25)
    assert activations.rows[2] == (3, 4, "·a ⏎", "·a 3.00, ⏎ 4.00", 7.0)
    assert "Inputs of 2 tokens, which blanks part, behind <s>, each token the one of 64" in section.text
    assert "ranked by the sum of the activations, 2 inputs kept in each step." in section.text
    assert {"Greedy search", "Ranked by", "Feature"} <= set(section.terms)
    assert "<b>&lt;$x$" not in page(section)


def test_greedy_searches_say_in_what_they_differ():
    alone = torch.tensor([], dtype=torch.long)
    section = greedy_search_section([greedy(), greedy(aggregate="last", prefix=alone, model=own("other"))])
    assert section.parts[0].columns == ("layer", "model", "begins", "ranked by", "feature 4", "feature 1")
    assert [row[:4] for row in section.parts[0].rows] == [
        (2, "tiny", "behind <s>", "sum"),
        (2, "other", "without BOS", "last"),
    ]
    assert "behind <s> or without BOS" in section.text
    assert "ranked by the sum of the activations or activation at the last token" in section.text
    with pytest.raises(ValueError, match="at least one result of search_greedy"):
        greedy_search_section([])


def test_gradient_searches_stand_beside_their_optimum():
    section = gradient_search_section(
        [gradient(optimum=2.5), gradient(prior="none")], text="What to look for."
    )
    table, picture = section.parts
    assert table.columns == (
        *("layer", "searched", "prior", "best tokens", "decoded by", "true activation", "optimum"),
        "nearest cosine",
    )
    assert table.rows == [
        (2, "feature 3 at every position", "norm", "·a " + MARKUP, "nearest", 1.5, 2.5, 0.625),
        (2, "feature 3 at every position", "none", "·a " + MARKUP, "nearest", 1.5, None, 0.625),
    ]
    assert "optimum" in {trace.name for trace in picture.figure.data}, "the first is drawn"
    assert "Dashed" in picture.caption
    assert section.text == (
        "What to look for.\n\n3 restarts of 2 tokens, at most 2 steps of Adam. For comparison: the cosine of "
        "a real embedding to the nearest other one is 0.250 on average."
    )
    assert {"Gradient search", "True activation", "Nearest cosine", "Prior"} <= set(section.terms)
    assert "<b>&lt;$x$" not in page(section)


def test_a_continuation_has_an_objective_in_the_place_of_an_activation():
    table, picture = gradient_search_section([continuation()]).parts
    assert table.columns[-4:] == ("best tokens", "decoded by", "true objective", "nearest cosine")
    assert table.rows == [(None, "the continuation b", "·a " + MARKUP, "nearest", 0.5, 0.625)]
    assert "Dashed" not in picture.caption
    with pytest.raises(ValueError, match="at least one result of search_gradient"):
        gradient_search_section([])


def test_alignment_stands_beside_chance():
    section = feature_alignment_section([alignment(), untrained()], names=["trained", "<i>new</i>"])
    shares, same, overlap, pairs = section.parts
    share = alignment().share()
    assert shares.rows[0] == (
        *("trained", "the same best token", 0.75, f"{share.low:.3f} to {share.high:.3f}", "0.125"),
        "aligned",
    )
    assert shares.rows[1][1:3] == ("of the 2 best tokens", 0.625)
    # 1 of 4 features in both layers, of a vocabulary of 64
    assert shares.rows[2][1:3] == ("token of the same number", 0.25)
    assert shares.rows[2][4:] == ("0.016", "more than chance")
    assert [row[:3] for row in shares.rows[3:]] == [
        ("<i>new</i>", "the same best token", 0.0),
        ("<i>new</i>", "of the 2 best tokens", 0.0),
        ("<i>new</i>", "token of the same number", 0.0),
        ("<i>new</i>", "token of the same number, <b>$other$", 1.0),
    ]
    assert shares.rows[3][-1] == "no more than chance"
    assert len(same.figure.data) == len(overlap.figure.data) == 2
    assert same.figure.data[0].z[0][1] == 0.75
    assert overlap.figure.data[0].z[0][1] == 0.625
    assert "trained 0.750" in same.description
    assert [row[:4] for row in pairs.rows] == [("trained", 0, 2, 0.75), ("<i>new</i>", 2, 2, 0.0)]
    assert "trained: each layer with each later one, 4 features of resid_post." in section.text
    assert "<i>new</i>: each layer with the same layer of the other, 4 features" in section.text
    assert {"Aligned features", "Chance", "Interval", "Token of the same number"} <= set(section.terms)
    text = page(section)
    assert "<i>new</i>" not in text
    assert "<b>$other$" not in text


def test_one_best_token_has_no_overlap():
    section = feature_alignment_section([alignment(top_k=1)])
    assert [type(part) for part in section.parts] == [Table, Plot, Table]
    assert [row[1] for row in section.parts[0].rows] == ["the same best token", "token of the same number"]
    assert section.parts[0].rows[0][0] == "tiny"
    with pytest.raises(ValueError, match="at least one result"):
        feature_alignment_section([])
    with pytest.raises(ValueError, match="names must be 1"):
        feature_alignment_section([alignment()], names=[])


def test_examples_have_their_windows_and_where_the_peaks_are():
    section = feature_examples_section(examples(), [(1, 2), (1, 6)], text="What to look for.")
    one, other, table = section.parts
    assert isinstance(one, Interactive)
    assert one.view.props["activations"][0][0][0][:3] == [0, -1.0, 2.123]
    assert other.view.props["activations"][0][0][0][:3] == [0, 9.0, 8.0]
    assert "Feature 2 of mlp_out of layer 1" in one.caption
    assert table.rows == [
        (1, 2, 1, 7, 2, pytest.approx(2.123456), f"<s>{MARKUP}[b]"),
        (1, 2, 2, 3, 1, 1.5, "<s>[·a]⏎"),
        (1, 6, 1, 3, 1, 9.0, "<s>[·a]⏎"),
        (1, 6, 2, 7, 2, 7.0, f"<s>{MARKUP}[b]"),
    ]
    assert section.text == (
        "What to look for.\n\nOf 9 windows of 3 tokens, which begin with BOS, those in which the feature is "
        "largest."
    )
    assert "Window" in section.terms
    assert "<b>&lt;$x$" not in page(section)
    with pytest.raises(ValueError, match=r"at least one \(layer, feature\)"):
        feature_examples_section(examples(), [])


def test_a_long_window_is_shown_around_its_peak():
    n_pos, peak = 40, 20
    activations = torch.zeros(1, 1, 1, n_pos)
    activations[..., peak] = 3.0
    long = examples(
        layers=(1,),
        features=(2,),
        tokens=torch.full((1, n_pos), 8),
        numbers=torch.tensor([5]),
        windows=torch.zeros(1, 1, 1, dtype=torch.long),
        positions=torch.full((1, 1, 1), peak),
        activations=activations,
        prepend_bos=False,
    )
    section = feature_examples_section(long, [(1, 2)])
    assert section.parts[-1].rows == [(1, 2, 1, 5, 20, 3.0, f"…{'b' * 12}[b]{'b' * 12}…")]
    assert "BOS" not in section.text
