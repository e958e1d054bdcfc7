"""The figure of patches by role shows the result's numbers."""

from __future__ import annotations

import pytest

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
