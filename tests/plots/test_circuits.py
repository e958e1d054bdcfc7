"""Circuit figures show the result's numbers with the right names."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from mechlens.plots.circuits import plot_circuit_corner, plot_eigenvalues, plot_positional_attention
from mechlens.plots.composition import plot_composition_scores, plot_head_graph
from mechlens.plots.style import ABSENT, DIVERGING, figure_text
from mechlens.text.display import MINUS
from tests.examples import circuit, composition, positional


def corner() -> pd.DataFrame:
    return pd.DataFrame(
        [[1.5, -3.0, 0.0], [0.25, 2.0, 1.0]],
        index=pd.Index([" a", "<b>$x$"], name="query"),
        columns=pd.Index([" a", " a", "\n"], name="key"),
    )


def test_composition_is_drawn_minus_its_baseline_with_earlier_heads_on_top():
    figure = plot_composition_scores(composition())
    (cells,) = figure.data
    assert list(cells.y) == ["L0H0", "L0H1", "L1H0", "L1H1"], "no head reads the last layer"
    assert list(cells.x) == ["L1H0", "L1H1", "L2H0", "L2H1"], "the first layer reads no head"
    expected = [
        [0.1 - 0.25, 0.3 - 0.25, 0.2 - 0.25, 0.4 - 0.25],
        [0.12 - 0.25, 0.32 - 0.25, 0.22 - 0.25, 0.42 - 0.25],
        [math.nan, math.nan, 0.21 - 0.25, 0.41 - 0.25],
        [math.nan, math.nan, 0.23 - 0.25, 0.43 - 0.25],
    ]
    # float32 numbers of about 0.1
    np.testing.assert_allclose(cells.z, expected, atol=1e-7)
    np.testing.assert_allclose(cells.customdata[..., 0], np.array(expected) + 0.25, atol=1e-7)
    # a tenth is one standard deviation
    np.testing.assert_allclose(cells.customdata[..., 1], np.array(expected) * 10, atol=1e-6)
    assert cells.zmin == -cells.zmax
    assert cells.zmax == pytest.approx(0.18)
    assert [color for _, color in cells.colorscale] == DIVERGING
    assert figure.layout.plot_bgcolor == ABSENT
    for part in ("<b>%{y} → %{x}</b>", "customdata[0]", "customdata[1]"):
        assert part in cells.hovertemplate


def test_layers_are_separated_and_named_if_heads_have_no_room():
    figure = plot_composition_scores(composition())
    assert [(line.x0, line.y0) for line in figure.layout.shapes] == [(1.5, 0), (0, 1.5)]
    assert figure.layout.xaxis.ticktext == ("L1H0", "L1H1", "L2H0", "L2H1")
    assert figure.layout.xaxis.type == "category"
    large = plot_composition_scores(composition(n_layers=4, n_heads=14))
    assert large.layout.xaxis.ticktext == ("layer 1", "layer 2", "layer 3")
    assert large.layout.xaxis.tickvals == ("L1H7", "L2H7", "L3H7")
    assert large.layout.yaxis.ticktext == ("layer 0", "layer 1", "layer 2")
    assert [line.x0 for line in large.layout.shapes][::2] == [13.5, 27.5]


def test_titles_state_the_measure_and_the_handling_of_rotation():
    result = dataclasses.replace(composition(), rotary="ignored")
    title = plot_composition_scores(result).layout.title.text
    assert "K-composition of heads" in title
    assert "the baseline's mean, 0.250 (standard deviation 0.100)" in title
    assert "highest scores: L1H1 → L2H1 0.43, L0H1 → L2H1 0.42, L1H0 → L2H1 0.41" in title
    assert "queries and keys without their rotation" in title
    assert "without their rotation" in plot_head_graph(result).layout.title.text
    assert "rotat" not in plot_composition_scores(composition()).layout.title.text
    low = dataclasses.replace(composition(), baseline_mean=0.9)
    assert "no score is above the baseline" in plot_composition_scores(low).layout.title.text


def test_a_model_of_one_layer_has_nothing_to_compose():
    with pytest.raises(ValueError, match="has only one"):
        plot_composition_scores(composition(n_layers=1))


def edges(figure) -> list:
    return [trace for trace in figure.data if "→" in (trace.name or "")]


def test_the_graph_connects_the_strongest_pairs():
    figure = plot_head_graph(composition(), top=3)
    drawn = edges(figure)
    # the strongest is drawn last, above the others
    assert [edge.name for edge in drawn] == ["L1H0 → L2H1", "L0H1 → L2H1", "L1H1 → L2H1"]
    for edge, (start, end) in zip(drawn, [((0, 1), (1, 2)), ((1, 0), (1, 2)), ((1, 1), (1, 2))], strict=True):
        # x is the head, y the layer; ends of arcs are exact up to rounding
        np.testing.assert_allclose([edge.x[0], edge.y[0], edge.x[-1], edge.y[-1]], start + end, atol=1e-12)
    widths = [edge.line.width for edge in drawn]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]
    assert len({edge.line.color for edge in drawn}) == 3
    assert {note.text: (note.x, note.y) for note in figure.layout.annotations} == {
        "L0H1": (1, 0),
        "L1H0": (0, 1),
        "L1H1": (1, 1),
        "L2H1": (1, 2),
    }
    assert figure.layout.yaxis.range == (-0.5, 2.5), "layer 0 is at the bottom"


def deep_graph(*pairs: tuple[tuple[int, int], tuple[int, int]], n_layers: int = 30) -> go.Figure:
    result = composition(n_layers=n_layers, n_heads=9)
    scores = result.scores * 0
    for (one, head), (other, later) in pairs:
        scores[one, head, other, later] = 0.5
    return plot_head_graph(dataclasses.replace(result, scores=scores))


def test_layers_without_edges_share_a_line_in_a_deep_graph():
    figure = deep_graph(((16, 0), (17, 3)), ((2, 1), (28, 8)))
    axis = figure.layout.yaxis
    assert list(axis.ticktext) == ["0-1", "2", "3-15", "16", "17", "18-27", "28", "29"]
    places = dict(zip(axis.ticktext, axis.tickvals, strict=True))
    # a line for several layers is narrower than one for a single layer
    assert places["17"] - places["16"] == 1 > places["16"] - places["3-15"] > 0.3
    notes = {note.text: (note.x, note.y) for note in figure.layout.annotations}
    assert notes == {
        "L16H0": (0, places["16"]),
        "L17H3": (3, places["17"]),
        "L2H1": (1, places["2"]),
        "L28H8": (8, places["28"]),
    }
    (dots,) = [trace for trace in figure.data if trace.name == "heads"]
    assert len(dots.x) == 5 * 9, "those of layers with a line of their own"
    assert figure.layout.height < 900
    for edge in edges(figure):
        start, end = edge.name.split(" → ")
        np.testing.assert_allclose([edge.x[0], edge.y[0]], notes[start], atol=1e-12)
        np.testing.assert_allclose([edge.x[-1], edge.y[-1]], notes[end], atol=1e-12)
    few = deep_graph(((1, 0), (6, 3)), n_layers=8)
    assert list(few.layout.yaxis.ticktext) == [str(layer) for layer in range(8)]


def test_edges_of_the_outermost_heads_stay_within_the_figure():
    for head in (0, 8):
        between = [((layer, head), (layer + 1, head)) for layer in range(5, 12)]
        figure = deep_graph(((2, head), (28, head)), *between)
        left, right = figure.layout.xaxis.range
        for edge in edges(figure):
            assert left < min(edge.x)
            assert max(edge.x) < right
        (long,) = [edge for edge in edges(figure) if edge.name.startswith("L2H")]
        assert max(abs(x - head) for x in long.x) > 0.4, "it still goes around the heads in between"


def test_edges_and_heads_show_their_scores_on_hover():
    figure = plot_head_graph(composition(), top=3)
    (points,) = [trace for trace in figure.data if trace.name == "scores"]
    text = next(each for each in points.hovertext if "L1H1 → L2H1" in each)
    assert text == (
        "<b>L1H1 → L2H1</b><br>score 0.430<br>over baseline +0.180<br>+1.8 of its standard deviations"
    )
    assert max(points.marker.color) == points.marker.cmax == pytest.approx(0.18)
    (heads,) = [trace for trace in figure.data if trace.name == "heads"]
    texts = dict(zip(zip(heads.y, heads.x, strict=True), heads.hovertext, strict=True))
    assert len(texts) == 6, "every head is there"
    assert texts[1, 0] == "<b>L1H0</b><br>is read by L2H1 +0.160"
    assert texts[2, 1].startswith("<b>L2H1</b><br>reads L1H1 +0.180<br>   L0H1 +0.170")
    assert "none of these" in texts[0, 0]


@pytest.mark.parametrize(
    ("past", "between"),
    [
        (((0, 1), (2, 1)), ((0, 0), (1, 1))),  # straight up
        (((0, 0), (2, 2)), ((1, 1), (2, 0))),  # across
        (((0, 1), (2, 2)), ((0, 0), (1, 2))),  # where an arc to the right would hit the other head
    ],
)
def test_an_edge_past_a_layer_goes_around_the_head_in_between(past, between):
    scores = composition(n_heads=3).scores * 0
    for (one, head), (other, later) in (past, between):
        scores[one, head, other, later] = 0.5
    drawn = edges(plot_head_graph(dataclasses.replace(composition(n_heads=3), scores=scores)))
    assert len(drawn) == 2
    (long,) = [edge for edge in drawn if edge.y[0] == 0 and edge.y[-1] == 2]
    # ends of arcs are exact up to rounding
    np.testing.assert_allclose((long.x[0], long.x[-1]), (past[0][1], past[1][1]), atol=1e-12)
    middle = len(long.x) // 2
    assert long.y[middle] == 1
    (head,) = [head for layer, head in between if layer == 1]
    assert abs(long.x[middle] - head) > 0.4, "as wide as half of a head's name"
    (short,) = [edge for edge in drawn if edge is not long]
    low, high = sorted((short.x[0], short.x[-1]))
    assert all(low <= x <= high for x in short.x), "nothing is in the way of a step to the next layer"


def test_pairs_below_the_baseline_have_no_edge():
    # pairs whose later head is H1 are above 0.25
    assert len(edges(plot_head_graph(composition(), top=99))) == 6
    low = dataclasses.replace(composition(), baseline_mean=0.9)
    figure = plot_head_graph(low)
    assert not edges(figure)
    assert "the 0 strongest" in figure.layout.title.text
    with pytest.raises(ValueError, match="at least 1, got 0"):
        plot_head_graph(composition(), top=0)


def test_a_corner_has_tokens_on_the_axes_of_its_circuit():
    figure = plot_circuit_corner(corner(), circuit())
    (cells,) = figure.data
    np.testing.assert_array_equal(cells.z, corner().to_numpy())
    assert (cells.zmin, cells.zmax) == (-3, 3)
    assert (figure.layout.yaxis.title.text, figure.layout.xaxis.title.text) == ("query", "key")
    assert figure.layout.yaxis.ticktext == ("·a", figure_text("<b>$x$"))
    # the same token may occur twice
    assert figure.layout.xaxis.ticktext == ("·a", "·a", "⏎")
    assert figure.layout.yaxis.autorange == "reversed", "rows go down as in a table"
    assert cells.hovertext[1][0] == f"query <b>{figure_text('<b>$x$')}</b><br>key <b>·a</b><br>0.250"
    title = figure.layout.title.text
    assert "<b>K-composition of L0H1 with L1H2</b>" in title
    assert "attention score before the model's scale" in title


def test_a_corner_of_another_circuit_or_of_nothing_is_refused():
    of_values = circuit(axes=("source", "destination"), name="full OV of L0H1")
    with pytest.raises(ValueError, match="axes are query and key, but the axes of the full OV of L0H1"):
        plot_circuit_corner(corner(), of_values)
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_circuit_corner(corner().iloc[:0])
    assert "Part of a circuit" in plot_circuit_corner(corner()).layout.title.text
    table = corner().rename_axis(index="source", columns="destination")
    assert "adds to the destination's logit" in plot_circuit_corner(table, of_values).layout.title.text
    in_stream = dataclasses.replace(of_values, spaces=("d_model", "d_model"))
    assert "writes to the destination" in plot_circuit_corner(table, in_stream).layout.title.text


def test_numbers_are_written_where_there_is_room():
    assert plot_circuit_corner(corner()).data[0].texttemplate == "%{z:.1f}"
    wide = pd.concat([corner()] * 5, axis=1).rename_axis(columns="key")
    assert not plot_circuit_corner(wide).data[0].texttemplate


def test_eigenvalues_are_at_their_angle_with_the_score_above():
    values = torch.tensor([4.0 + 0j, 0 + 2j, 0 - 2j, -1e-9 + 0j, 0j])
    figure = plot_eigenvalues(values)
    positive, negative = figure.data
    assert positive.theta == pytest.approx((0, 90, -90, 0), abs=1e-5)  # float32 angles in degrees
    # anything smaller than 4 / 10^4 is at the center
    assert positive.r == pytest.approx((4, 2, 2, 4e-4))
    assert negative.theta == pytest.approx((180,))
    assert negative.r == pytest.approx((4e-4,))
    assert negative.hovertext[0].endswith("magnitude 1e-09"), "and says its own size"
    assert positive.hovertext[2] == f"0 {MINUS} 2i<br>magnitude 2"
    assert positive.marker.symbol != negative.marker.symbol
    assert figure.layout.polar.radialaxis.range == pytest.approx((math.log10(4e-4), math.log10(4)))
    # 4 of 4 + 2 + 2
    assert f"copying score 0.500 ({MINUS}1 to 1); real part positive in 4 of 5" in figure.layout.title.text


def test_eigenvalues_of_a_circuit_are_computed():
    figure = plot_eigenvalues(circuit(rotary="unrotated"))
    assert (figure.data[0].r, figure.data[1].r) == ((2.0,), (1.0,))
    title = figure.layout.title.text
    assert "Eigenvalues of the K-composition of L0H1 with L1H2" in title
    assert "matching score 0.333" in title, "queries match keys"
    writes = plot_eigenvalues(circuit(axes=("source", "destination"), name="full OV of L0H1"))
    assert "copying score 0.333" in writes.layout.title.text
    assert "only the dimensions that are not rotated" in title
    nothing = plot_eigenvalues(circuit(A=torch.zeros(3, 2)))
    assert "matching score not measured" in nothing.layout.title.text
    assert "copying score not measured" in plot_eigenvalues(torch.zeros(2) * 1j).layout.title.text
    with pytest.raises(ValueError, match="3 x 4"):
        plot_eigenvalues(circuit(B=torch.ones(2, 4)))


def test_query_positions_start_at_the_top():
    result = positional()
    figure = plot_positional_attention(result)
    np.testing.assert_array_equal(figure.data[0].z, [[1.0, math.nan], [0.25, 0.75]])
    assert figure.layout.yaxis.autorange == "reversed"
    assert "Attention of L0H1 by positions alone" in figure.layout.title.text
    assert "divided by its own scale" in figure.layout.title.text
    shorter = plot_positional_attention(dataclasses.replace(result, normalized_positions=False))
    assert "divided" not in shorter.layout.title.text
