"""The section on how well a model does a task."""

from __future__ import annotations

from mechlens.results import RoleGrid, TaskPerformance
from mechlens.show.section import Figure, Section, Table, drawn, joined
from mechlens.text.display import count, number
from mechlens.text.task_library import BUILT_IN

_TERMS = {
    "Logit difference": "Log of the probability of the right answers over that of the wrong ones, in nats: "
    "the difference of their logits if each is one token.",
    "Chance": "Accuracy of a random guess among right and wrong answers.",
}
_ROWS = {
    "accuracy": "a right answer is likelier than every wrong one",
    "top1": "a right answer is the top-1 prediction",
    "logit_diff": "logit difference, nats",
    "probability_diff": "probability of right answers minus that of wrong ones",
    "corrupted_logit_diff": "logit difference on corrupted prompts, nats",
}


def task_section(result: TaskPerformance, *, top: int = 10, title: str = "Task", text: str = "") -> Section:
    """Whether the model does the task, and the first prompts.

    Args:
        top: number of prompts to list.
    """
    mean, low, high = result.estimates["accuracy"]
    said = f"Task {result.task}, {count(len(result.clean), 'prompt')}. "
    if low == low:
        said += (
            f"The model {'does' if result.able else 'does not do'} it: a right answer is likelier than "
            f"every wrong one in {mean:.0%} of the prompts ({low:.0%} to {high:.0%}); chance is "
            f"{result.chance:.0%}."
        )
    else:
        said += f"{result.note[0].upper()}{result.note[1:]}."
    about = BUILT_IN.get(result.task)
    if about is not None and result.counterfactual in about.counterfactuals:
        said += (
            f" In the corrupted prompts: {about.counterfactuals[result.counterfactual]}. {about.reference}."
        )
    means = Table(
        ("", "mean", f"{result.confidence:.0%} interval"),
        [
            (_ROWS[name], number(mean), f"{number(low)} to {number(high)}")
            for name, (mean, low, high) in result.estimates.items()
        ],
        "Means over prompts",
    )
    prompts = Table.of(result.summary(top), result.columns, "The first prompts", folded=True)
    return Section(title, joined(text, said), [means, prompts], _TERMS)


def role_grid_section(
    result: RoleGrid, *, top: int = 10, title: str = "Patches by role", text: str = ""
) -> Section:
    """The grid as a figure, and the largest effects as a table.

    Args:
        top: number of cells to list.
    """
    said = (
        f"Task {result.task}, {count(len(result.prompts), 'prompt')}. Without a patch the logit difference "
        f"is {number(float(result.clean.mean()))} in the clean run and "
        f"{number(float(result.corrupted.mean()))} in the corrupted run. {result.place} is patched into "
        f"the {result.into} run, with: {result.source}. "
        f"{result.said_of_effects()}"
    )
    by = f", by {' and '.join(result.axes)}" if result.axes else ""
    figure = Figure(
        drawn("plot_role_grid", result),
        f"Share of the way to the other run{by}. Hover for numbers.",
        wide=False,
    )
    table = Table.of(result.summary(top), result.columns, "The largest effects")
    note = f"Note: {result.note}." if result.note else ""
    terms = {"Logit difference": _TERMS["Logit difference"]}
    return Section(title, joined(text, said, note), [figure, table], terms)


SECTIONS = {TaskPerformance: task_section, RoleGrid: role_grid_section}
