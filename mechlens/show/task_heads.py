"""The section on the kinds of heads that carry a task."""

from __future__ import annotations

from mechlens.results import TaskHeads
from mechlens.results.task_circuits import METRIC_WORDS, SOURCES
from mechlens.show.section import Section, Table, joined
from mechlens.text.display import count


def task_heads_section(
    result: TaskHeads, *, top: int = 20, title: str = "Heads of the task", text: str = ""
) -> Section:
    """The most important heads, with what they attend to and what kind they are.

    Args:
        top: heads to list.
    """
    said = (
        f"Task {result.task}, {count(len(result.prompts), 'prompt')}. The effect is the estimated change in "
        f"the {METRIC_WORDS[result.metric]} if a head carries {SOURCES[result.by]}."
    )
    note = f"Note: {result.note}." if result.note else ""
    table = Table.of(result.summary(top), result.columns, "The heads with the largest effects, either way")
    return Section(title, joined(text, said, note), [table])


SECTIONS = {TaskHeads: task_heads_section}
