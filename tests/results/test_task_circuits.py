"""What results about a task's circuits make of their numbers."""

from __future__ import annotations

import pytest
import torch

from tests.examples import circuit_curve, component_set, edge_effects, task_circuit


def test_faithfulness_is_the_share_of_the_way_from_nothing_to_the_model():
    assert component_set().faithfulness[0] == 0.5
    found = task_circuit()
    assert found.faithfulness[0] == 0.75
    assert found.left[0] == 0.125
    assert found.random_faithfulness.tolist() == [0, 0.5]
    assert found.random_left.tolist() == [1, 0.5]


def test_the_interval_is_over_prompts_and_nan_for_a_single_one():
    values = torch.tensor([-4.0, 4.0, 4.0, 4.0])
    full, empty = torch.full((4,), 4.0), torch.full((4,), -4.0)
    found = component_set(values=values, full=full, empty=empty, prompts=tuple("abcd"))
    mean, low, high = found.faithfulness
    assert (mean, low, high) == (0.75, 0.25, 1.0)
    alone = component_set(values=values[:1], full=full[:1], empty=empty[:1], prompts=("a",))
    assert alone.faithfulness[0] == 0
    assert alone.faithfulness[1] != alone.faithfulness[1]


def test_a_member_adds_what_is_lost_without_it():
    table = task_circuit().to_dataframe().set_index("component")
    assert table["adds"].to_dict() == {"L0H0": 0.5, "L0H1": 0.25}
    assert list(task_circuit().summary(1)["component"]) == ["L0H0"]
    unasked = task_circuit(without=torch.empty(0, 2)).to_dataframe()
    assert unasked["adds"].isna().all()


def test_edges_that_help_come_first_or_the_largest_either_way():
    found = edge_effects()
    assert found.n_edges == 9
    assert found.top(2) == ("embed->L0H1.k", "L0H1->logits")
    assert found.top(3, absolute=True) == ("embed->L0H1.k", "L0H1->logits", "L0H0->logits")
    assert found.top(99)[-1] == "L0H0->logits"
    assert found.top_nodes(1) == ("L0H1",)
    assert found.nodes.tolist() == pytest.approx([-4.7, 3, -4])


def test_the_graph_is_written_in_dot():
    assert edge_effects().to_dot(3) == (
        'digraph "ioi" {\n  rankdir=BT;\n'
        '  "embed" -> "L0H1" [penwidth=4.50, label="k -5.000"];\n'
        '  "L0H1" -> "logits" [penwidth=3.70, label="-4.000"];\n'
        '  "L0H0" -> "logits" [penwidth=2.90, label="+3.000", style=dashed];\n'
        "}\n"
    )


def test_the_correlation_is_of_ranks_over_the_edges_that_were_measured():
    # estimates -5, 3, -4 and exact -6, 2, -1 have the same order
    assert edge_effects().correlation == pytest.approx(1)
    assert edge_effects(exact=torch.tensor([2.0, -6.0, -1.0])).correlation == pytest.approx(-1)
    none = edge_effects(exact_edges=(), exact=torch.empty(0))
    assert none.correlation != none.correlation
    assert "exact" not in none.summary()


def test_the_smallest_circuit_of_a_curve_is_faithful_enough():
    found = circuit_curve()
    assert [found.smallest(share) for share in (0.3, 0.5, 0.6, 1.1)] == [2, 2, 4, None]
    assert found.cpr == pytest.approx((0.25 * 0.5 + 0.5 * 1.5) / 2)
    assert found.cmd == pytest.approx((0.25 * 1.5 + 0.5 * 0.5) / 2)
    table = found.to_dataframe()
    assert table["share"].tolist() == [0.25, 0.5, 1]
    assert table["random"].tolist() == [0, 0, 1]


def test_an_undefined_share_is_nan():
    same = component_set(full=torch.full((2,), -4.0))
    assert same.faithfulness[0] != same.faithfulness[0]
