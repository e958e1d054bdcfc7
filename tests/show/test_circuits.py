"""A page's sections on circuits and composition say what their results hold."""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import pytest
import torch

from mechlens.measures.weights import top_k_accuracy
from mechlens.show.circuits import circuit_section, composition_section
from mechlens.show.page import render_report
from mechlens.show.section import Figure, Table
from mechlens.terminal import circuit_json, print_circuit
from mechlens.text.display import MINUS
from tests.plots.test_circuits import circuit, composition, corner


def test_a_circuit_has_its_part_its_eigenvalues_and_its_tables():
    found = circuit(rotary="relative", relative_position=2, embedding="effective")
    pairs = pd.DataFrame(
        {"query_id": [1], "query": [" <b>$x$"], "key_id": [2], "key": ["\n"], "value": [1.5]}
    )
    accuracy = {"key": {1: 0.75, 2: 1.0}, "query": {1: 0.25, 2: 0.5}}
    section = circuit_section(
        found, accuracy=accuracy, pairs=pairs, corner=corner(), text="What to look for."
    )
    part, eigenvalues, accuracies, largest = section.parts
    assert isinstance(part, Figure)
    assert list(part.figure.data[0].z[0]) == [1.5, -3.0, 0.0]
    assert "Eigenvalues" in eigenvalues.figure.layout.title.text
    assert isinstance(accuracies, Table)
    assert accuracies.columns == ("the token itself is among the largest", "top 1", "top 2")
    assert accuracies.rows == [
        ("key of each query", 0.75, 1.0),
        ("query of each key", 0.25, 0.5),
        ("by chance", "1 in 3", "2 in 3"),
    ]
    assert largest.rows == [("·<b>$x$", "⏎", 1.5)]
    assert section.title == "K-composition of L0H1 with L1H2"
    assert section.text == (
        "What to look for.\n\n3 x 3, query by key. Tokens come in by the effective embedding. In it: each "
        "key 2 before its query. Matching score 0.333."
    )
    assert eigenvalues.caption.endswith("Those to the right match.")
    assert (
        eigenvalues.description == "Eigenvalues of the K-composition of L0H1 with L1H2: matching score 0.333."
    )
    assert set(section.terms) == {"QK circuit", "Matching score", "Top-k accuracy"}
    page = render_report(section, title="A circuit", model=found.model)
    assert "<b>$x$" not in page
    assert "positive" in page


def test_of_a_circuit_of_zeros_nothing_is_perfect(capsys):
    """Every entry ties, so that none is larger than a token's own."""
    found = circuit(A=torch.zeros(3, 2))
    accuracy = {axis: {1: top_k_accuracy(found, 1, axis)} for axis in found.axes}
    assert accuracy == {"query": {1: 1.0}, "key": {1: 1.0}}
    section = circuit_section(found, accuracy=accuracy)
    assert [row[1] for row in section.parts[-1].rows[:2]] == ["undefined"] * 2
    assert "Matching score undefined." in section.text
    print_circuit(found, accuracy, math.nan, pd.DataFrame(), corner())
    assert capsys.readouterr().out.count("undefined") == 3
    shown = circuit_json(found, accuracy, math.nan, pd.DataFrame(), corner())
    assert all(math.isnan(share["top_1"]) for share in shown["accuracy"].values())
    assert not circuit().is_zero


def test_a_circuit_alone_is_its_eigenvalues_if_it_is_square(capsys):
    of_values = circuit(axes=("source", "destination"), name="full OV of L0H1")
    section = circuit_section(of_values, title="Copying")
    assert [type(part) for part in section.parts] == [Figure]
    assert section.parts[0].caption.endswith("Those to the right copy.")
    assert section.parts[0].description == "Eigenvalues of the full OV of L0H1: copying score 0.333."
    assert "Copying score 0.333." in section.text
    assert set(section.terms) == {"OV circuit", "Copying score", "Top-k accuracy"}
    print_circuit(
        of_values, {}, 1 / 3, pd.DataFrame(), corner().rename_axis(index="source", columns="destination")
    )
    assert "Copying score of its eigenvalues (-1 to 1): 0.333" in capsys.readouterr().out
    assert section.title == "Copying"
    flat = dataclasses.replace(of_values, A=of_values.A[:2])
    assert not circuit_section(flat).parts
    assert "score" not in circuit_section(flat).text


def test_composition_has_all_pairs_the_graph_and_the_strongest():
    section = composition_section(composition(), top=2, text="What to look for.")
    heatmap, graph, table = section.parts
    assert heatmap.figure.data[0].z.shape == (4, 4)
    assert [trace.name for trace in graph.figure.data if "→" in trace.name] == ["L0H1 → L2H1", "L1H1 → L2H1"]
    assert "Highest: L1H1 with L2H1, 0.430; L0H1 with L2H1, 0.420" in graph.description
    assert table.rows == [
        ("L1H1", "L2H1", *(pytest.approx(value) for value in (0.43, 0.18, 1.8))),
        ("L0H1", "L2H1", *(pytest.approx(value) for value in (0.42, 0.17, 1.7))),
    ]
    assert section.title == "K-composition of heads"
    assert section.text == (
        "What to look for.\n\nRandom weights of these sizes score 0.250 with a standard deviation of 0.1000, "
        "over 16 draws."
    )
    ignored = dataclasses.replace(composition(), rotary="ignored")
    assert "queries and keys without their rotation" in composition_section(ignored).text


def test_pairs_below_the_baseline_are_not_called_strong():
    section = composition_section(dataclasses.replace(composition(), baseline_mean=0.9))
    assert section.parts[-1].rows == []
    assert "none above the baseline" in section.parts[0].description
    assert MINUS not in section.text
    with pytest.raises(ValueError, match="at least 1, got 0"):
        composition_section(composition(), top=0)
    with pytest.raises(ValueError, match="has only one"):
        composition_section(composition(n_layers=1))
