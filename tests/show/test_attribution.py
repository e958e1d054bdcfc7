"""The section on direct logit attribution."""

from __future__ import annotations

from mechlens.show.attribution import attribution_section
from mechlens.show.section import Table
from tests.examples import attribution, neuron_attribution


def test_listed_neurons_are_a_table_that_sums_to_the_mlps():
    table = attribution_section(neuron_attribution()).parts[-1]
    assert isinstance(table, Table)
    assert table.headings == ("component", "added to the logit", "activation", "promotes", "suppresses")
    # the MLPs add 2 * (4 - 1.5) at the last position, and their biases 0.75 of it
    assert [[cell.text for cell in row] for row in table.cells()] == [
        ["L1N0", "\N{MINUS SIGN}6.000", "\N{MINUS SIGN}3.000", "<s> <b>", "·a <s>"],
        ["L0N2", "+2.000", "+1.000", "<b> ·a", "<s> ·a"],
        ["4 others", "+8.250", "—", "—", "—"],
        ["MLP biases", "+0.750", "—", "—", "—"],
        ["sum of MLPs", "+5.000", "—", "—", "—"],
    ]


def test_without_neurons_there_is_neither_a_table_nor_a_term():
    with_them, without = attribution_section(neuron_attribution()), attribution_section(attribution())
    assert len(without.parts) == len(with_them.parts) - 1
    assert set(with_them.terms) - set(without.terms) == {"Neuron"}
