"""Sections on circuits and composition show their results."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mechlens.show.circuits import circuit_section, composition_section
from mechlens.show.page import render_report
from mechlens.text.display import MINUS
from tests.examples import circuit, circuit_summary, composition


def test_a_summary_shows_its_part_its_eigenvalues_and_its_tables():
    found = circuit_summary(rotary="relative", relative_position=2, embedding="effective")
    section = circuit_section(found, text="What to look for.")
    part, in_terminal, eigenvalues, accuracies, largest = section.parts
    assert part.figure.data[0].z.tolist() == [[-1.0, 0.0], [0.0, 0.0]]
    assert (in_terminal.where, in_terminal.rows[0]) == ("terminal", ["·<b>$x$", -1.0, 0.0])
    assert "Eigenvalues" in eigenvalues.figure.layout.title.text
    assert accuracies.headings == ("the token itself is among the largest", "top 1", "top 2")
    assert accuracies.rows == [
        ("key for each query", 0.75, 1.0),
        ("query for each key", 0.25, 0.5),
        ("by chance", "1 in 3", "2 in 3"),
    ]
    assert largest.rows == [("·<b>$x$", "⏎", 1.5)]
    assert section.title == "K-composition of L0H1 with L1H2"
    assert section.text == (
        "What to look for.\n\n3 x 3, query by key. The embedding is the effective one. Rotation: each "
        "key 2 before its query. Matching score 0.333."
    )
    assert set(section.terms) == {"QK circuit", "Matching score", "Top-k accuracy"}
    assert "<b>$x$" not in render_report(section, title="A circuit", model=found.model)


def test_a_circuit_of_zeros_has_no_score():
    """All entries tie, so none is larger than a token's own."""
    found = dataclasses.replace(circuit_summary(), A=torch.zeros(3, 2), accuracy=torch.full((2, 2), math.nan))
    assert "Matching score undefined." in circuit_section(found).text
    accuracies = circuit_section(found).parts[-2]
    assert [cell.text for cell in accuracies.cells()[0][1:]] == ["—", "—"]
    assert math.isnan(found.to_json()["accuracy"]["key"]["top_1"])


def test_a_bare_circuit_shows_its_eigenvalues_if_it_is_square():
    of_values = circuit(axes=("source", "destination"), name="full OV of L0H1")
    section = circuit_section(of_values, title="Copying")
    (eigenvalues,) = section.parts
    assert eigenvalues.caption.endswith("Those on the right mean copying.")
    assert eigenvalues.description == "Eigenvalues of the full OV of L0H1: copying score 0.333."
    assert section.title == "Copying"
    assert set(section.terms) == {"OV circuit", "Copying score"}
    flat = dataclasses.replace(of_values, A=of_values.A[:2])
    assert not circuit_section(flat).parts
    assert "score" not in circuit_section(flat).text


def test_composition_shows_all_pairs_the_graph_and_the_strongest():
    section = composition_section(composition(), top=2)
    heatmap, graph, table = section.parts
    assert heatmap.figure.data[0].z.shape == (4, 4)
    assert [trace.name for trace in graph.figure.data if "→" in trace.name] == ["L0H1 → L2H1", "L1H1 → L2H1"]
    assert "Highest: L1H1 with L2H1, 0.430; L0H1 with L2H1, 0.420" in graph.description
    assert [[cell.text for cell in row] for row in table.cells()] == [
        ["L1H1", "L2H1", "0.430", "+0.180", "+1.8"],
        ["L0H1", "L2H1", "0.420", "+0.170", "+1.7"],
    ]
    assert "0.2500 with a standard deviation of 0.1000, over 16 draws." in section.text
    ignored = dataclasses.replace(composition(), rotary="ignored")
    assert "queries and keys without their rotation" in composition_section(ignored).text


def test_pairs_below_the_baseline_are_left_out():
    section = composition_section(dataclasses.replace(composition(), baseline_mean=0.9))
    assert section.parts[-1].rows == []
    assert "none above the baseline" in section.parts[0].description
    assert MINUS not in section.text
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        composition_section(composition(), top=0)
