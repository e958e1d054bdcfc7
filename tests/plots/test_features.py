"""Feature figures show the results' numbers and keep tokens as text."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from mechlens.plots.feature_alignment import plot_feature_alignment
from mechlens.plots.features import plot_feature_examples, plot_feature_tokens
from mechlens.plots.gradient_search import plot_gradient_search
from mechlens.plots.style import figure_text
from mechlens.results import GradientSearch
from mechlens.text.color import SEQUENTIAL
from mechlens.text.display import MINUS
from tests.examples import (
    MARKUP,
    alignment,
    continuation,
    exhaustive,
    feature_examples,
    gradient,
    of_layers,
    own,
    sites,
    untrained,
)

# -- best tokens -----------------------------------------------------------------------------------


def test_cells_have_the_best_token_and_how_many_layers_share_it():
    figure = plot_feature_tokens(exhaustive())
    (cells,) = figure.data
    assert [list(row) for row in cells.text] == [
        ["·a", "·a"],
        ["·a", "⏎"],
        ["b", figure_text(MARKUP[:14] + "…")],
    ]
    np.testing.assert_array_equal(cells.z, [[2, 1], [2, 1], [1, 1]])
    assert (cells.zmin, cells.zmax) == (1, 3)
    assert cells.colorbar.ticktext == ("1 of 3", "2 of 3", "3 of 3")
    assert [color for _, color in cells.colorscale] == SEQUENTIAL
    assert figure.layout.xaxis.ticktext == ("4", "1")
    assert figure.layout.yaxis.ticktext == ("0", "2", "3")
    assert figure.layout.yaxis.autorange is None, "layers go upwards"


def test_hover_texts_have_the_best_tokens_with_their_activations():
    hovers = plot_feature_tokens(exhaustive()).data[0].hovertext
    assert hovers[1][0] == "<b>layer 2, feature 4</b><br>1. ·a 4.000<br>2. b 1.500<br>first in 2 of 3 layers"
    assert hovers[2][1] == (
        f"<b>layer 3, feature 1</b><br>1. {figure_text(MARKUP)} {MINUS}7.000<br>2. ·a {MINUS}8.000"
        "<br>first in 1 of 3 layers"
    )


def test_chosen_layers_and_features_are_drawn_in_order():
    figure = plot_feature_tokens(exhaustive(), layers=[3, 0], features=[1], end="lowest")
    (cells,) = figure.data
    assert [list(row) for row in cells.text] == [["⏎"], ["b"]]
    assert figure.layout.yaxis.ticktext == ("3", "0")
    assert cells.hovertext[1][0].startswith(
        f"<b>layer 0, feature 1</b><br>1. b {MINUS}9.000<br>2. {figure_text(MARKUP)} {MINUS}9.000"
    )
    # only drawn layers count, each once
    np.testing.assert_array_equal(
        plot_feature_tokens(exhaustive(), layers=[2, 3, 3]).data[0].z, [[1, 1], [1, 1]]
    )
    assert "Minimally activating token" in figure.layout.title.text


def test_one_layer_has_no_agreement():
    figure = plot_feature_tokens(exhaustive(), layers=[2])
    assert not figure.data[0].showscale
    assert "first in" not in figure.data[0].hovertext[0][0]
    assert "darker" not in figure.layout.title.text


def test_the_first_eight_features_are_drawn_by_default():
    ids = torch.arange(10).reshape(1, 10, 1)
    many = exhaustive(
        layers=(0,),
        features=tuple(range(10, 20)),
        ids=ids,
        activations=ids + 1.0,
        lowest_ids=ids,
        lowest_activations=ids.float(),
        strings={str(token): f"t{token}" for token in range(10)},
    )
    (cells,) = plot_feature_tokens(many).data
    assert list(cells.text[0]) == [f"t{token}" for token in range(8)]
    (cells,) = plot_feature_tokens(many, features=range(10, 20)).data
    assert len(cells.text[0]) == 10


def test_a_feature_that_no_token_activates_has_a_dash():
    """It does not agree with any layer either; its lowest token is still shown."""
    ids = torch.tensor([[[0, 1], [0, 1]], [[0, 2], [0, 2]], [[0, 3], [2, 0]]])
    values = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[1.0, 0.5], [-0.0, -0.0]], [[0.0, 0.0], [3.0, 0.0]]])
    search = exhaustive(
        site="post",
        layers=(0, 1, 2),
        features=(4, 5),
        ids=ids,
        activations=values,
        lowest_ids=ids,
        lowest_activations=values,
        strings={str(token): f"t{token}" for token in range(4)},
    )
    (cells,) = plot_feature_tokens(search).data
    assert [list(row) for row in cells.text] == [["t0", "—"], ["t0", "—"], ["—", "t2"]]
    assert [list(row) for row in cells.z] == [[2, 1], [2, 1], [1, 1]]
    hovers = cells.hovertext
    assert hovers[0][0].endswith("1. t0 2.000<br>first in 2 of 3 layers")
    assert hovers[1][0].endswith("1. t0 1.000<br>2. t2 0.500<br>first in 2 of 3 layers")
    assert hovers[0][1].endswith("no token activates it")
    (cells,) = plot_feature_tokens(search, end="lowest").data
    assert [list(row) for row in cells.text] == [["t0", "t0"], ["t0", "t0"], ["t0", "t2"]]


def test_titles_name_the_search():
    title = plot_feature_tokens(exhaustive()).layout.title.text
    assert "Maximally activating token of each feature of resid_post" in title
    assert f"of all 64 tokens, each after {figure_text('<s>')}" in title
    nothing = torch.tensor([], dtype=torch.long)
    neurons = plot_feature_tokens(exhaustive(site="post", prefix=nothing, prepend_bos=False))
    assert "each neuron of the MLP" in neurons.layout.title.text
    assert "each without BOS" in neurons.layout.title.text
    assert neurons.layout.xaxis.title.text == "neuron"
    assert "<b>layer 0, neuron 4</b>" in neurons.data[0].hovertext[0][0]


def test_layers_and_features_that_were_not_searched_are_refused():
    with pytest.raises(ValueError, match=r"layer 1 was not searched: the search covers 0, 2, 3$"):
        plot_feature_tokens(exhaustive(), layers=[0, 1])
    with pytest.raises(ValueError, match=r"feature 2 was not searched: the search covers 4, 1$"):
        plot_feature_tokens(exhaustive(), features=[2])
    with pytest.raises(ValueError, match="no layer is chosen"):
        plot_feature_tokens(exhaustive(), layers=[])
    with pytest.raises(ValueError, match="end must be one of highest, lowest, got 'best'"):
        plot_feature_tokens(exhaustive(), end="best")


# -- alignment -------------------------------------------------------------------------------------


def test_alignment_is_drawn_side_by_side_on_one_scale():
    figure = plot_feature_alignment(alignment(), untrained(), names=["trained", "<i>new</i>"])
    trained, new = figure.data
    # a layer compared with itself is uninformative
    np.testing.assert_array_equal(trained.z, [[np.nan, 0.75], [0.75, np.nan]])
    assert figure.layout.plot_bgcolor not in (None, "white")
    np.testing.assert_array_equal(new.z, [[0], [0], [0]])
    for cells in (trained, new):
        assert (cells.zmin, cells.zmax) == (0, 1)
        assert cells.texttemplate == "%{z:.2f}"
    assert [cells.showscale for cells in figure.data] == [True, False]
    assert (figure.layout.xaxis.ticktext, figure.layout.yaxis.ticktext) == (("0", "2"), ("0", "2"))
    assert (figure.layout.xaxis2.ticktext, figure.layout.yaxis2.ticktext) == (("2",), ("0", "1", "2"))
    assert figure.layout.xaxis.title.text == figure.layout.yaxis2.title.text == "layer"
    assert figure.layout.xaxis2.title.text == f"layer of {figure_text('<b>$other$')}"
    assert figure.layout.xaxis.domain[1] < figure.layout.xaxis2.domain[0]


def test_each_alignment_has_its_share_with_interval_and_chance():
    figure = plot_feature_alignment(alignment(), untrained(), names=["trained", "<i>new</i>"])
    one, other = (note.text for note in figure.layout.annotations)
    share = alignment().share()
    assert one.startswith("<b>trained</b><br>")
    assert f"0.750 ({share.low:.3f} to {share.high:.3f})<br>chance 0.125: aligned" in one
    assert other.startswith(f"<b>{figure_text('<i>new</i>')}</b>")
    share = untrained().share()
    assert f"0.000 (0.000 to {share.high:.3f})<br>chance 0.125: no more than chance" in other
    (note,) = plot_feature_alignment(alignment(), what="overlap").layout.annotations
    assert "<b>tiny</b>" in note.text
    # 0.625 with an interval whose lower end, 0.23, is below chance
    assert "0.625 (" in note.text
    assert "chance 0.375: no more than chance" in note.text
    (unnamed,) = plot_feature_alignment(untrained()).layout.annotations
    assert figure_text("tiny with <b>$other$") in unnamed.text


def test_long_names_keep_clear_of_the_next_heatmap():
    name = "mechlens-books (random weights, seed 0, trained embeddings)"
    short, long = (plot_feature_alignment(untrained(other=own(each))) for each in ("x", name))
    assert "<b>tiny with mechlens-books (random<br>weights, seed 0, trained embeddings)</b>" in (
        long.layout.annotations[0].text
    )
    assert long.layout.xaxis.title.text.startswith("layer of mechlens-books (random<br>")
    assert long.layout.height > short.layout.height


def test_hover_texts_have_interval_chance_and_verdict():
    (cells,) = plot_feature_alignment(alignment()).data
    share = alignment().share("same", [(0, 2)])
    assert cells.hovertext[0][1] == (
        "<b>layer 0 with layer 2</b><br>the same best token: 0.750"
        f"<br>95% interval {share.low:.3f} to {share.high:.3f}<br>by chance 0.125<br>aligned"
    )
    assert not cells.hovertext[1][1]
    (cells,) = plot_feature_alignment(alignment(), what="overlap").data
    np.testing.assert_array_equal(cells.z, [[np.nan, 0.625], [0.625, np.nan]])
    assert "the same best tokens of 2: 0.625" in cells.hovertext[0][1]
    assert "by chance 0.375" in cells.hovertext[0][1]
    (cells,) = plot_feature_alignment(untrained()).data
    assert cells.hovertext[2][0].startswith(
        f"<b>layer 2 with layer 2 of {figure_text('<b>$other$')}</b><br>the same best token: 0.000<br>"
    )


def test_cells_count_features_that_some_token_activates_in_both_layers():
    activated = torch.tensor([[True, True, True, True], [True, False, False, True]])
    figure = plot_feature_alignment(alignment(activated=activated, other_activated=activated))
    assert "of up to 4 features" in figure.layout.title.text
    assert "of 4 features" in plot_feature_alignment(alignment()).layout.title.text
    (cells,) = figure.data
    np.testing.assert_array_equal(cells.z, [[np.nan, 0.5], [0.5, np.nan]])
    assert "the same best token: 0.500<br>" in cells.hovertext[0][1]
    assert "<br>of 2 features that tokens activate in both" in cells.hovertext[0][1]
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    figure = plot_feature_alignment(alignment(activated=nothing, other_activated=nothing))
    assert np.isnan(figure.data[0].z).all()
    assert "nothing to compare" in figure.layout.annotations[0].text


def test_two_sites_are_named_on_axes_in_titles_and_on_hover():
    figure = plot_feature_alignment(sites())
    assert figure.layout.yaxis.title.text == "layer (attn_out)"
    assert figure.layout.xaxis.title.text == "layer (mlp_out)"
    assert "<b>tiny, attn_out with mlp_out</b>" in figure.layout.annotations[0].text
    (cells,) = figure.data
    # none of these is a layer with itself
    np.testing.assert_array_equal(cells.z, [[1, 0.75], [0.75, 1]])
    assert cells.hovertext[0][0].startswith("<b>layer 0 (attn_out) with layer 0 (mlp_out)</b><br>")
    given = plot_feature_alignment(sites(), alignment(), names=["between", "attn_out with mlp_out"])
    assert [note.text.split("</b>")[0] for note in given.layout.annotations] == [
        "<b>between, attn_out with mlp_out",
        "<b>attn_out with mlp_out, resid_post",
    ]
    other = plot_feature_alignment(untrained(other_site="post"))
    assert other.layout.xaxis.title.text == f"layer of {figure_text('<b>$other$')} (post)"
    assert (
        f"<b>layer 0 (resid_post) with layer 2 of {figure_text('<b>$other$')} (post)</b>"
        in (other.data[0].hovertext[0][0])
    )
    same = plot_feature_alignment(alignment(within=False))
    assert same.layout.xaxis.title.text == "layer of the other tiny"


@pytest.mark.parametrize(("count", "rows"), [(1, [1]), (2, [2]), (3, [3]), (4, [2, 2]), (5, [3, 2])])
def test_heatmaps_are_in_rows_that_fit_a_page(count, rows):
    figure = plot_feature_alignment(*[alignment()] * count)
    at = [""] + [str(each) for each in range(2, count + 1)]
    heights = [figure.layout[f"yaxis{each}"].domain for each in at]
    lefts = [figure.layout[f"xaxis{each}"].domain[0] for each in at]
    expected = [row for row, length in enumerate(rows) for _ in range(length)]
    tops = sorted({height[1] for height in heights}, reverse=True)
    assert [tops.index(height[1]) for height in heights] == expected
    assert [lefts[i] < lefts[i + 1] for i in range(count - 1)] == [
        expected[i] == expected[i + 1] for i in range(count - 1)
    ]
    # each has its name above; narrower than a page's 1120 pixels, and a title of 60 letters is not cut
    assert [(note.x, note.y) for note in figure.layout.annotations] == [
        (left, height[1]) for left, height in zip(lefts, heights, strict=True)
    ]
    assert 600 <= figure.layout.width <= 1120
    margin = figure.layout.margin
    inner = figure.layout.height - margin.t - margin.b
    sizes = {round((high - low) * inner) for low, high in heights}
    assert sizes == {230}, "they do not shrink"
    color_bars = [cells.colorbar for cells in figure.data if cells.showscale]
    assert [(bar.lenmode, bar.len, bar.y) for bar in color_bars] == [("pixels", 230, 1)]


def test_one_layer_has_nothing_to_compare():
    alone = alignment(
        layers=(2,),
        other_layers=(2,),
        activated=torch.ones(1, 4, dtype=torch.bool),
        other_activated=torch.ones(1, 4, dtype=torch.bool),
        same=torch.ones(1, 1, 4, dtype=torch.bool),
        overlap=torch.ones(1, 1, 4),
        chance_same=torch.full((1, 1), torch.nan),
        chance_overlap=torch.full((1, 1), torch.nan),
        is_index=torch.zeros(1, 4, dtype=torch.bool),
        other_is_index=torch.zeros(1, 4, dtype=torch.bool),
    )
    (note,) = plot_feature_alignment(alone).layout.annotations
    assert "nothing to compare" in note.text
    with pytest.raises(ValueError, match="at least one result"):
        plot_feature_alignment()
    with pytest.raises(ValueError, match="names must be 2 texts, one for each result, got"):
        plot_feature_alignment(alignment(), alignment(), names=["one"])
    with pytest.raises(ValueError, match="got 'ab'"):
        plot_feature_alignment(alignment(), alignment(), names="ab")
    with pytest.raises(ValueError, match="what must be one of same, overlap, got 'x'"):
        plot_feature_alignment(alignment(), what="x")


def test_large_models_have_no_numbers_in_their_cells():
    assert plot_feature_alignment(of_layers(12)).data[0].texttemplate
    assert not plot_feature_alignment(of_layers(13)).data[0].texttemplate


@pytest.mark.parametrize("size", [12, 32])
def test_cells_too_small_in_rows_of_three_go_into_rows_of_two(size):
    figure = plot_feature_alignment(*[of_layers(size)] * 3)
    assert figure.layout.xaxis2.domain[0] > 0
    assert figure.layout.xaxis3.domain[0] == 0
    assert figure.layout.yaxis3.domain[1] < figure.layout.yaxis.domain[0]
    assert figure.layout.width <= 1120


# -- gradient search -------------------------------------------------------------------------------


def traces(result: GradientSearch) -> dict:
    return {trace.name: trace for trace in plot_gradient_search(result).data}


def test_each_restart_is_a_line_and_the_best_one_is_bold():
    drawn = traces(gradient())
    best, others = drawn["restart of the best tokens"], drawn["restarts"]
    assert (list(best.x), list(best.y)) == ([0, 1, 2], [-0.5, 4.0, 4.5])
    # a gap separates the lines of restarts 0 and 2
    assert list(others.x) == [0, 1, 2, None, 0, 1, 2, None]
    assert list(others.y) == [-1.0, 2.0, 3.0, None, -0.25, 0.0, 0.5, None]
    assert list(others.customdata[:3]) == [0, 0, 0]
    assert list(others.customdata[4:7]) == [2, 2, 2]
    assert best.line.width > others.line.width


def test_true_activations_are_to_the_right_of_the_last_step():
    figure = plot_gradient_search(gradient())
    drawn = traces(gradient())
    pinv, nearest = (drawn[f"tokens by {way}"] for way in ("pinv", "nearest"))
    assert list(pinv.y) == [1.0, 0.5, 0.25]
    assert list(nearest.y) == [0.5, 1.5, 0.0]
    assert 2 < pinv.x[0] < nearest.x[0] <= figure.layout.xaxis.range[1]
    assert nearest.hovertext[1] == (
        f"<b>·a {figure_text(MARKUP)}</b><br>restart 1, nearest<br>1.500"
        "<br>cosine of its embedding with the nearest real one 0.625"
    )
    sizes = [*pinv.marker.size, *nearest.marker.size]
    assert max(sizes) == nearest.marker.size[1]
    assert sizes.count(max(sizes)) == 1, "only the best is large"
    assert pinv.marker.symbol != nearest.marker.symbol
    assert max(figure.layout.xaxis.tickvals) == 2


@pytest.mark.parametrize(("steps", "last"), [(40, [35, 40]), (98, [84, 98]), (100, [91, 100]), (5, [4, 5])])
def test_the_last_step_is_labeled_without_overlap(steps, last):
    # every twelfth of 98 steps would be labeled up to the 96th, whose label is as wide as three steps
    values = torch.zeros(3, steps + 1)
    ticks = plot_gradient_search(gradient(objectives=values, activations=values)).layout.xaxis.tickvals
    assert list(ticks[-2:]) == last


def test_a_known_optimum_is_a_line():
    assert "optimum" not in traces(gradient())
    optimum = traces(gradient(optimum=2.5))["optimum"]
    assert list(optimum.y) == [2.5, 2.5]
    assert optimum.line.dash == "dash"
    title = plot_gradient_search(gradient(optimum=2.5)).layout.title.text
    assert f"best tokens: ·a {figure_text(MARKUP)}, 1.500; optimum 2.500" in title
    assert "feature 3 at every position" in title
    assert "resid_post of layer 2, after" in title
    assert "objective mean, prior norm, Adam, 3 restarts" in title
    assert "this block alone" not in title
    assert "this block alone" in plot_gradient_search(gradient(isolated=True)).layout.title.text


def test_a_continuation_shows_its_log_probability():
    figure, drawn = plot_gradient_search(continuation()), traces(continuation())
    assert list(drawn["restart of the best tokens"].y) == [-5.0, -4.0, -0.25]
    assert list(drawn["tokens by nearest"].y) == [-4.0, -0.5, -6.0]
    assert figure.layout.yaxis.title.text == "log-probability (nats)"
    assert "Gradient search for the continuation b" in figure.layout.title.text
    assert f", {MINUS}0.500" in figure.layout.title.text
    unknown = dataclasses.replace(continuation(), target_ids=torch.tensor([8, 9]))
    assert "the continuation of the ids 8, 9" in plot_gradient_search(unknown).layout.title.text
    assert not any(value is not None and math.isnan(value) for trace in figure.data for value in trace.y)


def test_a_target_shows_the_distance_from_it():
    figure = plot_gradient_search(gradient(objective="l1", target_ids=torch.tensor([5, 6]), optimum=2.5))
    drawn = {trace.name: trace for trace in figure.data}
    assert list(drawn["restart of the best tokens"].y) == [0.5, -4.0, -4.5], "the objective"
    assert figure.layout.yaxis.title.text == "L1 distance to the target's activations"
    assert "optimum" not in drawn, "which is an activation"
    cosine = plot_gradient_search(gradient(objective="cosine", target_ids=torch.tensor([5, 6])))
    assert cosine.layout.yaxis.title.text == "cosine distance to the target's activations"
    assert "objective l1 towards ·a⏎, prior" in figure.layout.title.text
    assert plot_gradient_search(gradient()).layout.yaxis.title.text == "activation (mean)"


def test_the_minimum_of_several_features_is_drawn_if_it_is_maximized():
    result = gradient(objective="min", objectives=gradient().objectives + 0.25, optimum=None)
    best = traces(result)["restart of the best tokens"]
    # minus the objective, not the mean of the activations
    assert list(best.y) == [-0.75, 3.75, 4.25]
    assert plot_gradient_search(result).layout.yaxis.title.text == "smallest activation"


def test_one_restart_is_the_best():
    one = gradient(
        objectives=torch.zeros(1, 3),
        activations=torch.zeros(1, 3),
        embeddings=torch.ones(1, 2, 8),
        nearest_cosine=torch.ones(1, 2),
        decoded_ids={"pinv": torch.tensor([[5, 5]])},
        ids={"pinv": torch.tensor([[5, 5]])},
        true_objectives={"pinv": torch.zeros(1)},
        true_activations={"pinv": torch.zeros(1)},
        selected_activations={"pinv": torch.zeros(1, 2)},
    )
    assert list(traces(one)) == ["restart of the best tokens", "tokens by pinv"]


# -- real contexts ---------------------------------------------------------------------------------


def test_windows_are_shaded_by_their_activations_largest_first():
    view = plot_feature_examples(feature_examples(), 1, 2)
    assert view.component == "TopkSamples"
    ((activations,),) = view.props["activations"]
    # BOS has none; four digits are kept
    assert [window[:3] for window in activations] == [[0, -1.0, 2.123], [0, 1.5, 0.25]]
    ((tokens,),) = view.props["tokens"]
    assert [len(window) for window in tokens] == [3, 3]
    assert tokens[1][1:] == ["·a", "⏎"]
    assert view.props["zerothDimensionLabels"] == ["1"]
    assert view.props["firstDimensionLabels"] == ["2"]
    assert view.props["firstDimensionName"] == "Feature"


def test_blue_and_red_are_shaded_on_one_scale():
    # the component's own rule: blue up to the largest of all numbers, red down to the smallest, or of its own
    # numbers if a window is shown alone; a number after the last token counts but is not drawn
    def scale(activations):
        return min(map(min, activations)), max(map(max, activations))

    ((shown,),) = plot_feature_examples(feature_examples(), 1, 2).props["activations"]
    for several in (shown, shown[:1], shown[1:]):
        assert scale(several) == (-2.123, 2.123)
    assert [len(window) for window in shown] == [3 + 2] * 2
    # for a feature that is never above 0 the red is as dark
    ((below,),) = plot_feature_examples(
        feature_examples(activations=-feature_examples().activations.abs()), 1, 6
    ).props["activations"]
    assert scale(below) == (-9, 9)
    ((nothing,),) = plot_feature_examples(
        feature_examples(activations=0 * feature_examples().activations), 1, 2
    ).props["activations"]
    assert scale(nothing) == (-1, 1), "0 of 0 has no color"


def test_a_token_cannot_begin_markup_in_the_view():
    ((tokens,),) = plot_feature_examples(feature_examples(), 1, 2).props["tokens"]
    evil = tokens[0][1]
    # circuitsvis inserts tokens as markup, where `<` and a letter or sign begin an element
    assert "</" not in evil
    assert "<b" not in evil
    assert "&l" not in evil
    assert evil.replace("\N{WORD JOINER}", "") == MARKUP, "and nothing is lost"
    assert plot_feature_examples(feature_examples(), 1, 2)._repr_html_().count("</script") == 1


def test_examples_that_were_not_searched_are_refused():
    with pytest.raises(ValueError, match="layer 2 was not searched"):
        plot_feature_examples(feature_examples(), 2, 2)
    with pytest.raises(ValueError, match="no window was read"):
        plot_feature_examples(feature_examples(), 0, 2)
