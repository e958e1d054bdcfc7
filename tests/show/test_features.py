"""A page's sections on features say what their results hold."""

from __future__ import annotations

import pytest
import torch

from mechlens.plots.feature_alignment import index_verdict
from mechlens.show.feature_alignment import feature_alignment_section
from mechlens.show.features import (
    complete_search_section,
    feature_examples_section,
    gradient_search_section,
    greedy_search_section,
)
from mechlens.show.page import render_report
from mechlens.show.section import Figure, Section, Table
from mechlens.text.display import MINUS
from tests.plots.test_features import (
    MARKUP,
    alignment,
    complete,
    continuation,
    examples,
    gradient,
    greedy,
    own,
    sites,
    untrained,
)


def page(section: Section) -> str:
    return render_report(section, title="Features", model=own())


def test_a_complete_search_has_its_picture_and_its_table():
    section = complete_search_section(complete(), layers=[0, 3], text="What to look for.")
    picture, table = section.parts
    assert isinstance(picture, Figure)
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
    assert "—" not in picture.caption
    neurons = complete_search_section(complete(site="post"))
    # below 0, no token excites a neuron; the lowest is there all the same
    assert neurons.parts[1].rows[-1] == (3, 1, "—", -7.0, "⏎", -9.0)
    assert "; — where no token does." in neurons.parts[0].caption
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
    assert "Inputs of 2 tokens (a blank parts two), behind <s>, each token the one of 64" in section.text
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
        *("layer", "searched", "prior", "best tokens", "decoded by", "true activation"),
        *("smallest of them", "optimum", "nearest cosine"),
    )
    assert table.rows == [
        (2, "feature 3 at every position", "norm", "·a " + MARKUP, "nearest", 1.5, 1.0, 2.5, 0.625),
        (2, "feature 3 at every position", "none", "·a " + MARKUP, "nearest", 1.5, 1.0, None, 0.625),
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
    shares, same, overlap, numbers, pairs = section.parts
    assert shares.columns == (
        *("compared", "the same best token", "chance", "verdict"),
        *("of the 2 best tokens", "chance", "verdict"),
    )

    def cell(share):
        return f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f})"

    one, two = alignment(), untrained()
    assert shares.rows == [
        [
            *("trained", cell(one.share()), "0.125", one.share().verdict),
            *(cell(one.share("overlap")), "0.375", one.share("overlap").verdict),
        ],
        [
            *("<i>new</i>", cell(two.share()), "0.125", "no more than chance"),
            *(cell(two.share("overlap")), "0.250", "no more than chance"),
        ],
    ]
    # 1 of 4 features in both layers, of a vocabulary of 64; the same model's once
    assert numbers.rows == [
        ("tiny", cell(one.index_share()), "0.016", index_verdict(one.index_share())),
        ("<b>$other$", cell(two.index_share(other=True)), "0.016", "more than chance"),
    ]
    assert numbers.rows[0][1].startswith("0.250")
    assert numbers.rows[1][1].startswith("1.000")
    assert len(same.figure.data) == len(overlap.figure.data) == 2
    assert same.figure.data[0].z[0][1] == 0.75
    assert overlap.figure.data[0].z[0][1] == 0.625
    assert "trained 0.750" in same.description
    assert "a layer with itself, which says nothing, is grey" in same.caption
    # no layer with itself
    assert [row[:4] for row in pairs.rows] == [
        ("trained", 0, 2, cell(one.share("same", [(0, 2)]))),
        ("<i>new</i>", 2, 2, cell(two.share("same", [(2, 2)]))),
    ]
    assert section.text == (
        "Compared are 4 features of resid_post. Each layer with each later one: trained. Each layer with the "
        "same layer of the other: <i>new</i>."
    )
    assert {"Aligned features", "Chance", "Interval", "Token of the same number"} <= set(section.terms)
    text = page(section)
    assert "<i>new</i>" not in text
    assert "<b>$other$" not in text


def test_one_best_token_has_no_overlap():
    section = feature_alignment_section([alignment(top_k=1)])
    assert [type(part) for part in section.parts] == [Table, Figure, Table, Table]
    assert section.parts[0].columns == ("compared", "the same best token", "chance", "verdict")
    assert section.parts[0].rows[0][0] == "tiny"
    assert section.text == "Compared are 4 features of resid_post, each layer with each later one."
    several = feature_alignment_section([alignment(top_k=1), alignment()])
    assert several.parts[0].columns[4] == "of the 2 best tokens"
    assert several.parts[0].rows[0][4:] == ["—", "—", "—"]
    with pytest.raises(ValueError, match="at least one result"):
        feature_alignment_section([])
    with pytest.raises(ValueError, match="names must be 1"):
        feature_alignment_section([alignment()], names=[])


def test_what_is_compared_is_named_where_it_differs():
    section = feature_alignment_section([alignment(site="post", other_site="post"), sites(), sites()])
    assert [row[0] for row in section.parts[0].rows] == ["tiny, post", *["tiny, attn_out with mlp_out"] * 2]
    assert section.text == (
        "4 neurons of the MLP, each layer with each later one: tiny, post. 4 features of attn_out with those "
        "of mlp_out, each layer with the same layer of the other: tiny, attn_out with mlp_out; tiny, "
        "attn_out with mlp_out."
    )
    *_, numbers, _ = section.parts
    assert [row[0] for row in numbers.rows] == ["tiny, post", "tiny, attn_out", "tiny, mlp_out"]


def test_the_page_says_how_many_features_have_no_best_token():
    excited = torch.ones(2, 4, dtype=torch.bool)
    excited[:, 1] = False
    section = feature_alignment_section([alignment(excited=excited)])
    assert section.text == (
        "Compared are 4 features of resid_post, each layer with each later one. Features that no token "
        "excites have no best token and are left out: 1 of 4 in each layer of tiny."
    )
    # features 0 and 2 of the three that are left; feature 0 is its token's id
    assert [row[1][:5] for row in (section.parts[0].rows[0], section.parts[-2].rows[0])] == ["0.667", "0.333"]


def test_directions_have_no_numbers_and_one_feature_no_chance():
    section = feature_alignment_section([alignment(site="direction", other_site="direction")])
    # only the pairs' table is left
    assert [type(part) for part in section.parts] == [Table, Figure, Figure, Table]
    alone = {
        name: getattr(alignment(), name)[..., :1]
        for name in ("same", "overlap", "is_index", "other_is_index", "excited", "other_excited")
    }
    nothing = {name: torch.full((2, 2), torch.nan) for name in ("chance_same", "chance_overlap")}
    section = feature_alignment_section([alignment(features=(0,), **alone, **nothing)])
    assert section.parts[0].rows[0][2:4] == ["—", "—"]
    assert section.text == "Compared are 1 feature of resid_post, each layer with each later one."


def test_examples_have_their_windows_and_where_the_peaks_are():
    section = feature_examples_section(examples(), [(1, 2), (1, 6)], text="What to look for.")
    one, other, table = section.parts
    assert isinstance(one, Figure)
    assert one.figure.props["activations"][0][0][0][:3] == [0, -1.0, 2.123]
    assert other.figure.props["activations"][0][0][0][:3] == [0, 9.0, 8.0]
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
