"""The logit-variance figure on a result with known values."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mechlens.plots.logit_variance import plot_logit_variance
from tests.examples import variance


def test_lines_and_bars_are_means_over_positions():
    figure = plot_logit_variance(variance())
    lines = [trace for trace in figure.data if trace.type == "scatter" and "lines" in trace.mode]
    # the mean logit of both bins, the spread of only the second (one token has none), the distance of both
    assert [list(line.y) for line in lines] == [
        [1.0, 5.0, 7.0],
        [2.0, 3.0, 4.0],
        [3.0, 4.0, 5.0],
        [3.0, 7.0, 9.0],
        [4.0, 5.0, 6.0],
    ]
    assert list(lines[0].x) == ["embed", "0", "1"]
    assert "25.0% together" in lines[0].hovertemplate
    bars, null, elsewhere = figure.data[-3:]
    assert [figure.layout.xaxis4.ticktext[x] for x in bars.x] == ["1", "2-64"]
    assert list(figure.layout.xaxis4.tickvals) == list(bars.x)
    assert list(bars.customdata) == ["1", "2-64"]
    assert list(bars.y) == [4.0, 7.0]
    assert list(null.y) == [5.0, 5.0]
    assert list(null.error_y.array) == [1.0, 0.0]
    assert list(null.error_y.arrayminus) == [1.0, 0.0]
    assert list(elsewhere.y) == [8.0, 14.0]
    assert "least over most probable: 1.75; in random bins 0.83 to 1.25, ranked at another position 1.75" in (
        figure.layout.title.text
    )


def test_the_diamond_does_not_cover_the_whisker():
    figure = plot_logit_variance(variance())
    bars, null, elsewhere = figure.data[-3:]
    # with nine bins in a panel of half the figure's width
    pixels = figure.layout.width * 0.44 / 9
    for bar, left, right in zip(bars.x, null.x, elsewhere.x, strict=True):
        assert bar - 0.3 < left < bar < right < bar + 0.3
        assert (right - left) * pixels > elsewhere.marker.size / 2 + null.error_y.width / 2


def test_bins_differ_by_color_and_symbol():
    first, second = plot_logit_variance(variance()).data[:2]
    assert first.line.color != second.line.color
    assert first.marker.symbol != second.marker.symbol


def test_a_single_position_has_no_mark_for_other_positions():
    alone = dataclasses.replace(variance(), elsewhere_variance=torch.full((2, 1, 2), math.nan))
    figure = plot_logit_variance(alone)
    assert "rank at another position" not in [trace.name for trace in figure.data]
    assert "ranked at another position not measured" in figure.layout.title.text
    assert math.isnan(alone.estimates()["elsewhere_ratio"])
    assert alone.estimates()["variance_ratio"] == pytest.approx(1.75)
