"""A page's section on patched runs shows its result."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mechlens.show.page import render_report
from mechlens.show.patching import patching_section
from mechlens.show.section import Figure, Table
from tests import examples


def test_a_grid_is_drawn_and_its_largest_changes_are_listed():
    section = patching_section(examples.patch_grid(), top=3, text="What to look for.")
    plot, table = section.parts
    assert isinstance(plot, Figure)
    assert isinstance(table, Table)
    assert "Largest: L0 at 1 1.000, L0 at 2 0.500" in plot.description
    # ties stay in order
    assert [each.name for each in table.columns] == ["cell", "token", "effect", "mean"]
    assert [row[0] for row in table.rows] == ["L0 at 1", "L0 at 2", "L1 at 1"]
    assert [cell.text for cell in table.cells()[0]] == ["L0 at 1", "·a", "+1.000", "2.000"]
    assert section.text == (
        "What to look for.\n\n1 prompt of 4 tokens. Without a patch the loss is 1.000 nats."
    )
    assert "Standard error" not in section.terms


def test_heads_of_several_prompts_have_bars_and_errors():
    section = patching_section(examples.patch_grid(axes=("layer", "head"), n_prompts=2), top=2)
    _, bars, table = section.parts
    assert list(bars.figure.data[0].y) == ["L0H0", "L0H1"]
    assert table.rows[0] == ["L0H0", *map(pytest.approx, (1.125, 0.125, 2.125))]
    assert set(section.terms) == {"Patch", "Effect", "Standard error", "Nat"}


def test_a_corrupted_run_and_a_note_are_named_and_escaped():
    result = dataclasses.replace(
        examples.patch_grid(), corrupted=torch.tensor([5.0]), note="every patch was a whole run"
    )
    section = patching_section(result)
    assert section.text.endswith(", 5.000 in the corrupted run. Note: every patch was a whole run.")
    assert "Recovered" in section.terms
    assert section.parts[-1].columns[-1].name == "recovered"
    page = render_report(section, title="Patching", model=result.model)
    assert "<b>$x$" not in page
    with pytest.raises(ValueError, match="at least 1"):
        patching_section(result, top=0)
