"""The section on how well a model does a task."""

from __future__ import annotations

from mechlens.results import TaskPerformance
from mechlens.show.section import Section, Table, joined
from mechlens.text.display import count, number
from mechlens.text.task_library import BUILT_IN

_TERMS = {
    "Logit difference": "Log of the probability of the right answers over that of the wrong ones, in nats; "
    "the difference of their logits where each is one token.",
    "Chance": "Accuracy of a guess among right and wrong answers.",
}
_ROWS = {
    "accuracy": "a right answer likelier than every wrong one",
    "top1": "a right answer is the top-1 prediction",
    "logit_diff": "logit difference, nats",
    "probability_diff": "probability of right answers minus that of wrong ones",
    "corrupted_logit_diff": "logit difference, nats, corrupted prompts",
}


def task_section(result: TaskPerformance, *, top: int = 10, title: str = "Task", text: str = "") -> Section:
    """Whether the model does the task, and the first prompts.

    Args:
        top: prompts to list.
    """
    mean, low, high = result.estimates["accuracy"]
    said = (
        f"Task {result.task}, {count(len(result.clean), 'prompt')}. The model "
        f"{'does' if result.able else 'does not do'} it: a right answer is likelier than every wrong one in "
        f"{mean:.0%} of the prompts ({low:.0%} to {high:.0%}); chance is {result.chance:.0%}."
    )
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


SECTIONS = {TaskPerformance: task_section}
