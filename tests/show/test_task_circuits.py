"""The sections on a task's circuits say the numbers, what was replaced by what, and the null."""

from __future__ import annotations

import torch

from mechlens.show.section import section
from tests.examples import circuit_curve, component_set, edge_effects, task_circuit

MINUS = "\N{MINUS SIGN}"


def test_a_circuit_is_shown_beside_random_ones():
    found = section(task_circuit())
    assert found.text == (
        f"Task ioi, 2 prompts. The mean logit difference is 4.000 in the whole model and {MINUS}4.000 with "
        "everything replaced. What is replaced carries its value on the corrupted prompt. The circuit "
        "has 2 components, 66.7% of the model's."
    )
    shares, members = found.parts
    assert [row[1] for row in shares.rows] == ["0.750", "0.125"]
    assert shares.rows[0][3] == "mean 0.250, at most 0.500"
    assert shares.columns[3] == "2 random sets"
    assert [row[0] for row in members.rows] == ["L0H0", "L0H1"]
    assert "(M(circuit) - M(nothing)) / (M(model) - M(nothing))" in found.terms["Faithfulness"]


def test_a_circuit_of_many_edges_names_the_first():
    edges = tuple(f"L0H{head}->logits" for head in range(12))
    found = section(task_circuit(components=edges, without=torch.empty(0, 2), n_possible=120))
    assert found.text.endswith(
        f"has 12 edges, 10.0% of the model's. Its members: {', '.join(edges[:10])} and 2 more."
    )
    assert len(found.parts) == 1


def test_the_edges_say_how_they_were_estimated_and_how_well():
    found = section(edge_effects(), top=1)
    assert "The effect of each of the 9 edges is estimated by edge attribution patching." in found.text
    assert "For 3 edges it was also measured exactly" in found.text
    assert "The rank correlation of both is 1.000." in found.text
    (row,) = found.parts[1].cells()
    assert [cell.text for cell in row] == ["embed->L0H1.k", f"{MINUS}5.000", "0.250", f"{MINUS}6.000"]
    integrated = section(edge_effects(steps=5, note="the model cannot do it"))
    assert "with integrated gradients (5 steps)" in integrated.text
    assert integrated.text.endswith("Note: the model cannot do it.")


def test_a_curve_has_its_areas_and_whole_numbers():
    found = section(circuit_curve())
    assert "CPR is 0.438, CMD 0.312." in found.text
    assert [cell.text for cell in found.parts[1].cells()[1][:3]] == ["2", "0.5000", "0.500"]


def test_a_set_says_whether_it_is_kept_or_replaced():
    assert (
        "With 1 component kept, and everything else replaced, 0.500 of the task is left"
        in section(component_set()).text
    )
    assert "With 1 component replaced, 0.500" in section(component_set(kept=False)).text
