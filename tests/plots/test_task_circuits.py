"""The figures of a task's circuits hold the result's numbers."""

from __future__ import annotations

import pytest

from mechlens.plots.task_circuits import plot_circuit_curve, plot_edge_graph
from tests.examples import circuit_curve, edge_effects


def test_the_curve_is_drawn_beside_random_and_exact_rankings():
    figure = plot_circuit_curve(circuit_curve(note="the model cannot do it"))
    random, exact, ranked = figure.data
    assert list(exact.y) == [0.25, 1, 1]
    assert exact.name == "by exact effects"
    assert list(ranked.x) == [0.25, 0.5, 1]
    assert list(ranked.y) == [0, 0.5, 1]
    assert list(random.y) == [0, 0, 1]
    assert (random.line.dash, random.name) == ("dot", "random sets")
    assert ranked.text[1].startswith(
        "<b>2 edges, 50.00%</b><br>faithfulness 0.500<br>95% interval 0.250 to 0.750"
    )
    assert "CPR 0.438, CMD 0.312" in figure.layout.title.text
    assert "the model cannot do it" in figure.layout.title.text
    assert figure.layout.xaxis.type == "log"


def test_components_stand_above_the_role_of_their_largest_effect():
    figure = plot_edge_graph(edge_effects(), top=3)
    names = {each.text: (each.x, each.y) for each in figure.layout.annotations}
    # S2 has the embedding; END has both heads of the layer side by side, and the logits above their middle
    assert names == {"embed": (0, 0), "L0H0": (1.4, 1), "L0H1": (2.4, 1), "logits": (pytest.approx(1.9), 2)}
    assert list(figure.layout.yaxis.tickvals) == [1]
    assert list(figure.layout.yaxis.ticktext) == ["0"]
    assert list(figure.layout.xaxis.ticktext) == ["S2", "END"]
    assert list(figure.layout.xaxis.tickvals) == [0, 1.9]
    without = edge_effects(roles=("END", "elsewhere"), node_roles=edge_effects().node_roles[:, 1:])
    assert list(plot_edge_graph(without, top=3).layout.xaxis.ticktext) == ["0", "1", "MLP"]


def test_edges_are_as_wide_as_their_effects_and_dashed_where_they_hurt():
    figure = plot_edge_graph(edge_effects(), top=3, by_role=False)
    assert len(figure.data) == 3
    largest, second, hurts = figure.data
    assert largest.text[0].startswith("<b>embed → L0H1.k</b><br>effect \N{MINUS SIGN}5.000")
    assert largest.line.width > second.line.width > hurts.line.width
    assert [line.line.dash for line in figure.data] == ["solid", "solid", "dash"]
    # from the embedding at the bottom to the logits above the only layer
    names = {each.text: (each.x, each.y) for each in figure.layout.annotations}
    assert names == {"embed": (1, -1), "L0H0": (0, 0), "L0H1": (1, 0), "logits": (1, 1)}
    assert [list(each.y) for each in figure.data] == [[-1, -0.5, 0], [0, 0.5, 1], [0, 0.5, 1]]
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "MLP"]
    assert list(figure.layout.yaxis.tickvals) == [0]
    assert "a replaced edge carries its value on the corrupted prompt" in figure.layout.title.text
    assert len(plot_edge_graph(edge_effects(), top=2, absolute=False).data) == 2
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        plot_edge_graph(edge_effects(), top=0)
