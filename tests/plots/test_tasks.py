"""The figure of patches by role shows the result's numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mechlens.plots.style import HEADS
from mechlens.plots.tasks import plot_role_grid
from tests.examples import role_grid


def test_cells_are_recovered_shares_or_changes():
    figure = plot_role_grid(role_grid())
    (cells,) = figure.data
    assert cells.z.tolist() == [[0.25, 0.75], [0.0, -0.25]]
    assert (cells.zmin, cells.zmax) == (-1, 1), "little recovered looks like little"
    assert (list(cells.x), list(cells.y)) == (["S2", "&lt;END&gt;"], [0, 2])
    assert list(cells.text[1]) == ["0.00", "\N{MINUS SIGN}0.25"]
    assert cells.hovertext[0][1].startswith(
        "<b>layer 0, &lt;END&gt;</b><br>change 3.000 logits<br>standard error 1.000"
    )
    assert "Share of the way to the clean run" in figure.layout.title.text
    changes = plot_role_grid(role_grid(note="the model cannot do the task"), value="effect")
    assert changes.data[0].z.tolist() == [[1.0, 3.0], [0.0, -1.0]]
    assert "the model cannot do the task" in changes.layout.title.text
    with pytest.raises(ValueError, match="value must be one of effect, recovered, got 'mean'"):
        plot_role_grid(role_grid(), value="mean")


def by_head(n_heads, axes, **changes):
    """Two layers; the effect of a cell is its number in the grid."""
    shape = [{"layer": 2, "head": n_heads, "role": 2}[axis] for axis in axes]
    effects = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    heads = tuple(itertools.product((0, 2), range(n_heads)))
    return role_grid(site="z", axes=axes, heads=heads, values=torch.stack([effects - 2] * 2), **changes)


def test_a_grid_by_head_and_role_has_a_row_for_each_head():
    (cells,) = plot_role_grid(by_head(2, ("layer", "head", "role")), value="effect").data
    assert list(cells.y) == ["L0H0", "L0H1", "L2H0", "L2H1"]
    assert cells.z.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert cells.hovertext[2][0].startswith("<b>L2H0, S2</b><br>change 4.000 logits")


def test_of_many_heads_those_with_the_largest_effects_are_drawn():
    figure = plot_role_grid(by_head(30, ("layer", "head", "role")), value="effect")
    (cells,) = figure.data
    assert (len(cells.y), cells.y[0], cells.y[-1]) == (HEADS, "L0H20", "L2H29")
    assert cells.z[0].tolist() == [40, 41]
    assert "the 40 of 60 heads with the largest effects" in figure.layout.title.text


def test_a_grid_by_layer_and_head_names_the_roles_that_are_patched_together():
    figure = plot_role_grid(by_head(2, ("layer", "head")), value="effect")
    (cells,) = figure.data
    assert (list(cells.y), list(cells.x), cells.z.tolist()) == ([0, 2], ["0", "1"], [[0, 1], [2, 3]])
    assert cells.hovertext[1][1].startswith("<b>L2H1</b>")
    assert "z at S2 and &lt;END&gt; patched with" in figure.layout.title.text
    (wide,) = plot_role_grid(by_head(30, ("layer", "head"))).data
    assert wide.text is None, "numbers would not fit"


@pytest.mark.parametrize(
    ("axes", "hovers"),
    [
        (("layer",), [["<b>layer 0</b>"], ["<b>layer 2</b>"]]),
        (("role",), [["<b>all layers, S2</b>", "<b>all layers, &lt;END&gt;</b>"]]),
        ((), [["<b>all layers</b>"]]),
    ],
)
def test_a_grid_of_one_axis_or_none_is_drawn(axes, hovers):
    (cells,) = plot_role_grid(by_head(2, axes)).data
    assert [[text.split("<br>")[0] for text in row] for row in cells.hovertext] == hovers
