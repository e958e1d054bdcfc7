"""Patching figures show the result's numbers, centered at 0."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from mechlens.plots.patching import plot_head_effects, plot_patch_grid
from mechlens.plots.style import DIVERGING
from mechlens.results import PatchGridResult
from mechlens.results.patching import cell_label
from mechlens.text.color import SEQUENTIAL
from tests import examples

EFFECTS = [[1.0, 0.5, 0.0], [-0.5, 0.0, 0.25]]


def test_effects_are_drawn_around_zero_with_tokens_below():
    figure = plot_patch_grid(examples.patch_grid())
    (cells,) = figure.data
    np.testing.assert_array_equal(cells.z, EFFECTS)
    assert (cells.zmin, cells.zmax) == (-1, 1)
    assert [color for _, color in cells.colorscale] == DIVERGING
    assert figure.layout.xaxis.ticktext == ("·a", "⏎", "&lt;b&gt;&#36;x&#36;")
    assert figure.layout.yaxis.ticktext == ("0", "1")
    assert cells.hovertext[0][0] == (
        "<b>layer 0</b><br>position 1: ·a<br>loss changes by +1.000 nats"
        "<br>patched 2.000, without the patch 1.000"
    )
    title = figure.layout.title.text
    assert "Change in loss (nats), mlp_out patched" in title
    assert "2 positions earlier" in title


def test_several_prompts_have_errors_and_no_tokens():
    figure = plot_patch_grid(examples.patch_grid(n_prompts=2))
    (cells,) = figure.data
    # the mean of 0 and 1/4 extra
    np.testing.assert_allclose(cells.z, np.array(EFFECTS) + 0.125)
    assert figure.layout.xaxis.ticktext == ("1", "2", "3")
    # the standard deviation of 0 and 1/4, 0.177, divided by the square root of 2
    assert "standard error 0.125" in cells.hovertext[0][0]
    assert "·a" not in cells.hovertext[0][0]


def test_the_metric_itself_and_the_recovered_share():
    result = examples.patch_grid()
    (cells,) = plot_patch_grid(result, value="mean").data
    np.testing.assert_array_equal(cells.z, examples.PATCHED)
    assert (cells.zmin, cells.zmax) == (0, 2)
    assert [color for _, color in cells.colorscale] == SEQUENTIAL
    with pytest.raises(ValueError, match="needs a corrupted run"):
        plot_patch_grid(result, value="recovered")
    corrupted = dataclasses.replace(result, corrupted=torch.tensor([5.0]))
    (cells,) = plot_patch_grid(corrupted, value="recovered").data
    np.testing.assert_array_equal(cells.z, np.array(EFFECTS) / 4)
    assert (cells.zmin, cells.zmax) == (-1, 1), "little recovered looks like little"
    assert "recovered 0.250" in cells.hovertext[0][0]


def test_recovery_is_measured_from_the_corrupted_run():
    result = dataclasses.replace(
        examples.patch_grid(), into="corrupted", corrupted=torch.tensor([3.0]), source="the clean run"
    )
    figure = plot_patch_grid(result)
    np.testing.assert_array_equal(figure.data[0].z, examples.PATCHED - 3)
    assert "without the patch 3.000" in figure.data[0].hovertext[0][0]
    assert "with: the clean run; into the corrupted run" in figure.layout.title.text


def test_heads_have_names_on_hover_and_numbers_below():
    figure = plot_patch_grid(examples.patch_grid(axes=("layer", "head")))
    assert figure.data[0].hovertext[1][2].startswith("<b>L1H2</b><br>loss changes by +0.250 nats")
    assert figure.layout.xaxis.ticktext == ("0", "1", "2")


def test_a_grid_of_three_axes_has_a_row_for_each_head_until_a_head_or_a_position_is_chosen():
    result = examples.patch_grid(axes=("layer", "head", "pos"))
    figure = plot_patch_grid(result)
    np.testing.assert_array_equal(figure.data[0].z, result.effect.flatten(0, 1))
    assert figure.layout.yaxis.ticktext == ("L0H0", "L0H1", "L1H0", "L1H1")
    assert (
        figure.data[0].hovertext[3][0].startswith("<b>L1H1</b><br>position 1: ·a<br>loss changes by +0.500")
    )
    (cells,) = plot_patch_grid(result, head=1).data
    np.testing.assert_array_equal(cells.z, np.array(EFFECTS) + 1)
    assert cells.hovertext[1][0].startswith("<b>L1H1</b><br>position 1: ·a<br>loss changes by +0.500")
    (cells,) = plot_patch_grid(result, position=3).data
    np.testing.assert_array_equal(cells.z, [[0.0, 1.0], [0.25, 1.25]])
    assert cells.hovertext[1][0].startswith("<b>L1H0</b><br>position 3: &lt;b")
    with pytest.raises(ValueError, match="choose position="):
        plot_head_effects(result)
    assert list(plot_head_effects(result, position=3).data[0].x) == [1.25, 1.0, 0.25, 0.0]


def test_among_many_heads_the_largest_effects_are_drawn(monkeypatch):
    monkeypatch.setattr("mechlens.plots.style.HEADS", 2)
    result = examples.patch_grid(axes=("layer", "head", "pos"))
    figure = plot_patch_grid(result)
    assert figure.layout.yaxis.ticktext == ("L0H1", "L1H1")
    np.testing.assert_array_equal(figure.data[0].z, result.effect[:, 1])
    assert "the 2 of 4 heads with the largest effects" in figure.layout.title.text


def test_layers_alone_are_bars_with_errors():
    (bars,) = plot_patch_grid(examples.patch_grid(axes=("layer",), n_prompts=2)).data
    assert list(bars.x) == ["0", "1"]
    assert list(bars.y) == [1.125, -0.375]
    np.testing.assert_allclose(bars.error_y.array, 0.125)
    assert bars.marker.color[0] != bars.marker.color[1]


def test_the_largest_effects_come_first_whatever_their_sign():
    result = examples.patch_grid(axes=("layer", "head"), n_prompts=2)
    result = dataclasses.replace(result, values=result.values - 0.125)
    (bars,) = plot_head_effects(result, top=3).data
    assert list(bars.y) == ["L0H0", "L0H1", "L1H0"]
    assert list(bars.x) == [1.0, 0.5, -0.5]
    np.testing.assert_allclose(bars.error_x.array, 0.125)
    assert bars.marker.color[0] == bars.marker.color[1] != bars.marker.color[2]
    assert "the 3 largest of 6 heads" in plot_head_effects(result, top=3).layout.title.text


def test_a_cell_without_a_value_is_gray_not_zero():
    result = examples.patch_grid(axes=("layer", "head"))
    values = result.values.clone()
    values[0, 0, 1] = math.nan
    result = dataclasses.replace(result, values=values)
    figure = plot_patch_grid(result)
    assert np.isnan(figure.data[0].z[0][1])
    assert figure.layout.plot_bgcolor != "white"
    assert "L0H1" not in plot_head_effects(result).data[0].y


@pytest.mark.parametrize(
    ("axes", "options", "message"),
    [
        (("layer", "pos"), {"value": "loss"}, "value must be one of effect, mean, recovered"),
        (("layer", "pos"), {"head": 1}, "by layer and pos: leave out head"),
        (("layer", "pos"), {"position": 9}, "position 9 was not patched: the patches cover 1, 2, 3"),
    ],
)
def test_missing_values_and_cells_are_refused(axes, options, message):
    with pytest.raises(ValueError, match=message):
        plot_patch_grid(examples.patch_grid(axes=axes), **options)


def test_head_effects_need_heads():
    with pytest.raises(ValueError, match="by layer and pos, not by head"):
        plot_head_effects(examples.patch_grid())
    with pytest.raises(ValueError, match="at least 1, got 0"):
        plot_head_effects(examples.patch_grid(axes=("layer", "head")), top=0)


@pytest.mark.parametrize(
    ("cell", "name"),
    [
        ((5, 5, None), "L5H5"),
        ((0, None, 51), "L0 at 51"),
        ((1, 2, 3), "L1H2 at 3"),
        ((None, None, 3), "position 3"),
        ((None, None, None), "all"),
    ],
)
def test_a_cell_is_named_after_what_it_patches(cell, name):
    assert cell_label(*cell) == name


def test_positions_alone_are_bars_and_a_single_cell_is_refused():
    grid = examples.patch_grid()
    positions = dataclasses.replace(grid, axes=("pos",), values=grid.values[:, 0])
    (bars,) = plot_patch_grid(positions).data
    assert list(bars.x) == ["1", "2", "3"]
    assert bars.hovertext[0].startswith("<b>all layers</b><br>position 1: ·a<br>loss changes by +1.000")
    with pytest.raises(ValueError, match="a single cell"):
        plot_patch_grid(dataclasses.replace(grid, axes=(), values=grid.values[:, 0, 0]))


# -- numbers ---------------------------------------------------------------------------------------


def by_head(values: torch.Tensor) -> PatchGridResult:
    """A grid by layer and head, for one prompt, with these effects."""
    n_layers, n_heads = values.shape
    return dataclasses.replace(
        examples.patch_grid(axes=("layer", "head")),
        layers=tuple(range(n_layers)),
        heads=tuple((layer, head) for layer in range(n_layers) for head in range(n_heads)),
        values=1 + values[None],
    )


def test_cells_of_a_small_grid_show_their_numbers():
    (cells,) = plot_patch_grid(examples.patch_grid(axes=("layer", "head"))).data
    assert [list(line) for line in cells.text] == [["1.00", "0.50", "0.00"], ["−0.50", "0.00", "0.25"]]  # noqa: RUF001
    assert cells.texttemplate == "%{text}"
    title = plot_patch_grid(examples.patch_grid(axes=("layer", "head"))).layout.title.text
    # L0H1 and L1H0 tie, so the earlier comes first; cells without effect are not named
    assert "largest effects: L0H0 1.00, L0H1 0.50, L1H0 −0.50" in title  # noqa: RUF001


def test_a_large_grid_shows_and_names_the_largest_effects():
    effects = torch.zeros(30, 9)
    effects[23, 3], effects[20, 0], effects[24, 4], effects[29, 0], effects[2, 1] = 3.0, 2.0, -2.5, -0.5, 0.75
    figure = plot_patch_grid(by_head(effects))
    written = {
        (layer, head): text
        for layer, line in enumerate(figure.data[0].text)
        for head, text in enumerate(line)
        if text
    }
    assert written == {(23, 3): "3.00", (24, 4): "−2.50", (20, 0): "2.00", (2, 1): "0.75", (29, 0): "−0.50"}  # noqa: RUF001
    assert "largest effects: L23H3 3.00, L24H4 −2.50, L20H0 2.00<" in figure.layout.title.text  # noqa: RUF001


def test_cells_without_room_have_no_numbers_but_are_named():
    effects = torch.zeros(2, 64)
    effects[1, 40] = 1.0
    figure = plot_patch_grid(by_head(effects))
    assert figure.data[0].text is None
    assert "largest effects: L1H40 1.00<" in figure.layout.title.text
    nothing = plot_patch_grid(by_head(torch.zeros(2, 3)))
    assert "no effects" in nothing.layout.title.text


def test_positions_are_named_with_their_tokens():
    title = plot_patch_grid(examples.patch_grid()).layout.title.text
    # only layer 0 of position 1 is named
    words = "largest by position: L0 at 1 ·a 1.00, L0 at 2 ⏎ 0.50, L1 at 3 &lt;b&gt;&#36;x&#36; 0.25<"
    assert words in title
    several = plot_patch_grid(examples.patch_grid(n_prompts=2)).layout.title.text
    assert "L0 at 1 1.12" in several
