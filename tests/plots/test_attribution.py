"""The attribution figure on a result with known values."""

from __future__ import annotations

import dataclasses

import pytest

from mechlens.plots.attribution import plot_attribution
from tests.examples import CONTRIBUTIONS, attribution


def test_every_component_of_a_layer_has_its_cell():
    heat = plot_attribution(attribution(), position=0).data[0]
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert list(heat.z[0]) == [1.0, -2.0, pytest.approx(0.001), nan, 0.5, 4.0]
    assert list(heat.z[1]) == [0.0, 3.0, -0.75, nan, 0.0, -1.5]
    assert (heat.zmin, heat.zmax) == (-4.0, 4.0)
    # small numbers get one more digit; only the missing column is empty
    assert list(heat.text[0]) == ["1.00", "\N{MINUS SIGN}2.00", "0.001", "", "0.50", "4.00"]
    assert list(heat.text[1])[:2] == ["0.000", "3.00"]
    assert heat.hovertext[1][1] == "<b>L1H1</b><br>adds 3.000"
    assert heat.hovertext[0][5] == "<b>L0 MLP</b><br>adds 4.000"


def test_bars_show_the_largest_contributions_and_sum_to_the_logit():
    result = attribution()
    figure = plot_attribution(result, row=1, position=-1, largest=2)
    bars = figure.data[1]
    assert list(bars.y) == ["L0 MLP", "L1H1", "embed", "pos_embed", "final bias", "8 others"]
    assert bars.x[:5] == (80.0, 60.0, 5.0, -2.5, 1.25)
    # float32 sums
    assert sum(bars.x) == pytest.approx(float(result.logit[1, 1]), abs=1e-4)
    assert bars.marker.color[3] != bars.marker.color[0]
    everything = plot_attribution(result, largest=99).data[1]
    assert len(everything.y) == len(CONTRIBUTIONS)
    assert figure.layout.xaxis.ticktext == ("0", "1", "2", "bias", "MLP")


def test_small_numbers_are_written_and_zero_has_no_sign():
    figure = plot_attribution(
        attribution(CONTRIBUTIONS | {"L0H1": -0.002, "final bias": -0.002, "embed": -1e-5})
    )
    assert figure.data[0].text[0][1] == "\N{MINUS SIGN}0.004"
    written = dict(zip(figure.data[1].y, figure.data[1].text, strict=True))
    assert written["final bias"] == "\N{MINUS SIGN}0.004"
    assert written["embed"] == "0.000"


def test_the_title_names_the_target():
    figure = plot_attribution(attribution())
    assert "logit of “&lt;b&gt;” minus that of “·a”" in figure.layout.title.text
    assert "after &lt;s&gt;·a (position 1)" in figure.layout.title.text
    alone = dataclasses.replace(attribution(), against_ids=None)
    assert "minus" not in plot_attribution(alone).layout.title.text


def test_a_model_without_mlps_and_one_with_zero_contributions():
    values = {name: 0.0 for name in CONTRIBUTIONS if "MLP" not in name}
    figure = plot_attribution(attribution(values))
    assert figure.layout.xaxis.ticktext == ("0", "1", "2", "bias")
    assert figure.data[0].zmax > 0


def test_errors():
    with pytest.raises(ValueError, match="row must be between -2 and 1, got 2"):
        plot_attribution(attribution(), row=2)
    with pytest.raises(ValueError, match="position must be between -2 and 1, got -3"):
        plot_attribution(attribution(), position=-3)
    with pytest.raises(ValueError, match="largest must be at least 1, got 0"):
        plot_attribution(attribution(), largest=0)
