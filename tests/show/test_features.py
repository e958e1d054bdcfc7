"""Sections on features show their results."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mechlens.show.feature_alignment import feature_alignment_section
from mechlens.show.features import exhaustive_search_section, feature_examples_section, greedy_search_section
from mechlens.show.gradient_search import gradient_search_section
from mechlens.show.page import render_report
from mechlens.show.section import Figure, Section, Table, section
from tests.examples import (
    MARKUP,
    alignment,
    continuation,
    exhaustive,
    feature_examples,
    gradient,
    greedy,
    own,
    sites,
    untrained,
)


def tables(made: Section) -> list[Table]:
    return [part for part in made.parts if isinstance(part, Table)]


def figures(made: Section) -> list[Figure]:
    return [part for part in made.parts if isinstance(part, Figure)]


@pytest.mark.parametrize("make", [exhaustive, greedy, gradient, alignment, feature_examples])
def test_every_result_has_a_section_with_escaped_markup(make):
    made = section(make(), title="Title", text="What to look for.")
    assert made.title == "Title"
    assert made.text.startswith("What to look for.\n\n")
    assert "<b>&lt;$x$" not in render_report(made, title="Features", model=own())


def test_an_exhaustive_search_shows_both_ends_of_some_features():
    made = exhaustive_search_section(exhaustive(), layers=[0, 3], features=[4])
    (picture,), (table,) = figures(made), tables(made)
    assert list(picture.figure.data[0].text[0]) == ["·a"]
    assert "feature 4 of layer 3: b" in picture.description
    assert table.headings == ("layer", "feature", "rank", "highest", "activation", "lowest", "activation")
    assert table.rows[0] == [0, 4, 1, "·a", 2.0, "b", -9.0]
    assert "the 64 tokens, after <s>. Shown: 1 of 2 features." in made.text
    neurons = exhaustive_search_section(exhaustive(site="post"))
    assert "—: no (further) token activates the neuron (1 of 6 have none)." in neurons.text
    assert {"Neuron", "Exhaustive search"} <= set(neurons.terms)
    with pytest.raises(ValueError, match="feature 7 was not searched"):
        exhaustive_search_section(exhaustive(), features=[7])


def test_greedy_searches_state_only_differences():
    alone = torch.tensor([], dtype=torch.long)
    made = greedy_search_section([greedy(), greedy(aggregate="last", prefix=alone, model=own("other"))])
    (table,) = tables(made)
    assert table.headings[:6] == ("model", "begins", "ranked by", "layer", "feature", "rank")
    assert table.rows[0][:8] == ["tiny", "after <s>", "sum of the activations", 2, 4, 1, "·a ⏎", "2.00 3.00"]
    assert table.rows[4][:3] == ["other", "without BOS", "activation at the last token"]
    single = greedy(ids=greedy().ids[:, :1], activations=greedy().activations[:, :1])
    assert tables(section(single))[0].headings[0:3] == ("layer", "feature", "input")
    with pytest.raises(ValueError, match="at least one result of search_greedy"):
        greedy_search_section([])


def test_gradient_searches_are_compared_with_their_optimum():
    made = gradient_search_section([gradient(optimum=2.5), gradient(prior="none")])
    (table,) = tables(made)
    assert table.headings == (
        *("prior", "decoded by", "tokens", "activation", "smallest activation", "nearest cosine"),
        *("found by", "optimum"),
    )
    assert table.rows[1] == [
        "norm",
        "nearest embedding",
        f"·a {MARKUP}",
        1.5,
        1.0,
        0.625,
        "1 of 3 restarts",
        2.5,
    ]
    assert table.rows[3][-1] is None
    (picture,) = figures(made)
    assert "optimum" in {trace.name for trace in picture.figure.data}, "the first search is drawn"
    assert "Dashed" in picture.caption
    assert "the search missed it by 1.000" in section(gradient(optimum=2.5)).text
    with pytest.raises(ValueError, match="at least one result of search_gradient"):
        gradient_search_section([])


def test_a_continuation_has_an_objective_and_no_activation():
    (table,) = tables(section(continuation()))
    assert table.headings == ("decoded by", "tokens", "objective", "nearest cosine", "found by")
    assert table.rows[1][:3] == ["nearest embedding", f"·a {MARKUP}", 0.5]


def cell(share):
    return f"{share.value:.3f} ({share.low:.3f} to {share.high:.3f})"


def test_alignments_are_compared_with_chance():
    one, two = alignment(), untrained()
    made = feature_alignment_section([one, two], names=["trained", "<i>new</i>"])
    same, overlap, numbers, pairs = tables(made)
    assert same.rows == [
        ("trained", cell(one.share()), "0.125", "aligned"),
        ("<i>new</i>", cell(two.share()), "0.125", "no more than chance"),
    ]
    assert overlap.rows[0] == ("trained", cell(one.share("overlap")), "0.375", "no more than chance")
    # 1 of 4 features in both layers, with a vocabulary of 64; the same model is listed once
    assert numbers.rows == [
        ("tiny", cell(one.index_share()), "0.016", one.index_share().index_verdict),
        ("<b>$other$", cell(two.index_share(other=True)), "0.016", "more than chance"),
    ]
    # no layer is compared with itself
    assert [row[:3] for row in pairs.rows] == [("trained", 0, 2), ("<i>new</i>", 2, 2)]
    first, second = figures(made)
    assert len(first.figure.data) == len(second.figure.data) == 2
    assert first.figure.data[0].z[0][1] == 0.75
    assert second.figure.data[0].z[0][1] == 0.625
    assert made.text == (
        "4 features of resid_post, each layer with each later one: trained. 4 features of resid_post, each "
        "layer with the same layer of the other: <i>new</i>."
    )
    page = render_report(made, title="Features", model=own())
    assert "<i>new</i>" not in page
    assert "<b>$other$" not in page


def test_an_alignment_states_what_it_leaves_out():
    excited = torch.tensor([[True, True, True, True], [True, False, False, True]])
    made = section(alignment(activated=excited, other_activated=excited, top_k=1))
    assert "left out: 0 to 2 of 4 in a layer of tiny." in made.text
    assert len(tables(made)) == 3, "one best token has no overlap"
    with pytest.raises(ValueError, match="at least one result"):
        feature_alignment_section([])
    with pytest.raises(ValueError, match="names must be 1 texts, one for each result"):
        feature_alignment_section([alignment()], names=[])


def test_one_layer_is_not_compared_with_itself():
    made = section(
        untrained(
            layers=(2,),
            **{
                name: getattr(untrained(), name)[2:]
                for name in ("activated", "same", "overlap", "chance_same", "chance_overlap", "is_index")
            },
        )
    )
    assert "Layers are not compared with each other, because only one was searched." in made.text


def test_sites_are_named_where_they_differ():
    made = feature_alignment_section([alignment(site="post", other_site="post"), sites()])
    assert [row[0] for row in tables(made)[0].rows] == ["tiny, post", "tiny, attn_out with mlp_out"]
    assert "4 neurons of the MLP, each layer with each later one: tiny, post." in made.text
    assert "4 features of attn_out with those of mlp_out, each layer with the same layer" in made.text


def test_two_models_of_one_name_are_distinguished():
    found = untrained(other=own(), within=False)
    assert [row[0] for row in tables(section(found))[-2].rows] == ["tiny", "the other tiny"]


def test_layers_of_two_models_are_compared_by_their_intervals():
    near = alignment(same=torch.zeros(2, 2, 4, dtype=torch.bool))
    made = feature_alignment_section([alignment(), near], names=["layers, trained", "layers, random"])
    # with four features, intervals are wide
    assert made.text.endswith("trained 0.750, random 0.000 (the intervals overlap).")
    each = ("same", "overlap", "is_index", "other_is_index", "activated", "other_activated")
    many = {name: getattr(alignment(), name).repeat_interleave(100, -1) for name in each}
    wide = alignment(features=tuple(range(400)), **many)
    far = dataclasses.replace(wide, same=torch.zeros(2, 2, 400, dtype=torch.bool))
    made = feature_alignment_section([wide, far], names=["layers, trained", "layers, random"])
    assert made.text.endswith("(the intervals do not overlap).")


def test_directions_have_no_index_and_one_feature_has_no_chance():
    made = section(alignment(site="direction", other_site="direction"))
    assert [table.caption[:8] for table in tables(made)] == ["Features", "Overlap ", "Features"]
    each = ("same", "overlap", "is_index", "other_is_index", "activated", "other_activated")
    alone = {name: getattr(alignment(), name)[..., :1] for name in each}
    nothing = {name: torch.full((2, 2), torch.nan) for name in ("chance_same", "chance_overlap")}
    made = section(alignment(features=(0,), **alone, **nothing))
    assert tables(made)[0].rows[0][2:] == (None, None)


def test_examples_show_their_windows_and_where_the_peaks_are():
    made = feature_examples_section(feature_examples(), places=[(1, 2)])
    (picture,), (table,) = figures(made), tables(made)
    assert picture.figure.props["activations"][0][0][0][:3] == [0, -1.0, 2.123]
    assert "Feature 2 of mlp_out of layer 1" in picture.caption
    assert table.rows[1] == [1, 2, 2, 3, 1, 1.5, "<s>«·a»⏎"]
    assert made.text == (
        "The windows with the largest activations among 9 windows of 3 tokens, each with BOS first. Shown: 1 "
        "of 2 features."
    )
    with pytest.raises(ValueError, match=r"at least one \(layer, feature\)"):
        feature_examples_section(feature_examples(), places=[])
