"""The section on a task says whether the model can do it."""

from __future__ import annotations

from mechlens.show.tasks import task_section
from tests.examples import task_performance


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
