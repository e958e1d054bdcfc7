"""The section on a task says whether the model can do it."""

from __future__ import annotations

from mechlens.show.tasks import role_grid_section, task_section
from tests.examples import role_grid, task_performance


def test_a_failed_task_is_shown_with_its_interval_and_chance():
    section = task_section(task_performance())
    assert section.text == (
        "Task agreement, 2 prompts. The model does not do it: a right answer is likelier than every wrong "
        "one in 50% of the prompts (0% to 100%); chance is 50%. In the corrupted prompts: the subject has "
        "the other number. Linzen et al. 2016, arXiv:1611.01368."
    )
    means, prompts = section.parts
    assert means.rows[2] == ("logit difference, nats", "0.000", "\N{MINUS SIGN}1.000 to 1.000")
    # one line each, and the rank without decimals
    assert [cell.text for cell in prompts.cells()[1]] == [
        "The⏎keys",
        " are",
        "\N{MINUS SIGN}1.000",
        "\N{MINUS SIGN}1.500",
        "3",
    ]


def test_a_passed_task_says_so_and_a_users_own_task_has_no_reference():
    estimates = task_performance().estimates | {"accuracy": (0.9, 0.8, 1.0)}
    result = task_performance(task="mine", estimates=estimates)
    assert result.able
    assert not result.note
    text = task_section(result).text
    assert "The model does it" in text
    assert "corrupted" not in text


def test_a_grid_by_head_is_described_with_its_axes_and_roles():
    grid = role_grid(
        site="z", axes=("layer", "head"), heads=((0, 0), (0, 1), (2, 0), (2, 1)), roles=("S2", "END")
    )
    section = role_grid_section(grid)
    assert "z at S2 and END is patched into the corrupted run" in section.text
    figure, table = section.parts
    assert figure.caption.startswith("Share of the way to the other run, by layer and head.")
    assert table.headings[0] == "head"
    assert [row[0].text for row in table.cells()] == ["L0H1", "L0H0", "L2H1", "L2H0"]
