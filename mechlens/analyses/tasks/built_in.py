"""The built-in tasks, made for a model's tokenizer."""

from __future__ import annotations

from mechlens.analyses.tasks.task import Task
from mechlens.arguments import check_counts, check_model, generator_of
from mechlens.models.protocol import LensModel
from mechlens.text.task_library import made


def load_task(
    name: str,
    model: LensModel,
    *,
    n: int = 64,
    seed: int = 0,
    counterfactual: str | None = None,
    prepend_bos: bool | None = None,
) -> Task:
    """Make the prompts of a built-in task for a model's tokenizer.

    Names, years and words that must be a single token but are not are left out.

    Args:
        name: `ioi` (indirect object identification), `greater-than` (a later year), `agreement` (subject-verb
            agreement across another noun), `capitals`, `gender` (the pronoun for a name), `docstring` (the
            next argument) or `induction` (random words begin again; its roles are the last word's FIRST
            occurrence, the NEXT word, which is the answer, and the OTHER, which is the wrong one).
        model: the model to run; its tokenizer encodes the prompts.
        n: number of prompts.
        seed: for drawing the prompts.
        counterfactual: how the corrupted prompts differ; None is the task's default. For `ioi`,
            `swap-subject` (which swaps the answer) or `other-names`.
        prepend_bos: whether to prepend BOS; None prepends it if the tokenizer has one.

    Raises:
        ArgumentError: an unknown name or counterfactual, or `n` is below 1.
        ValueError: too few words are single tokens for this model, or it splits years differently.

    Example:
        >>> task = mechlens.load_task("agreement", model, n=4)
        >>> task.prompts[1].answers
        (' are',)

    References: Wang et al. 2022, arXiv:2211.00593; Hanna et al. 2023, arXiv:2305.00586; Linzen et al. 2016,
    arXiv:1611.01368.
    """
    check_model(model)
    check_counts(n=n)
    prompts, chosen = made(model, name, n, generator_of(seed), counterfactual)
    return Task(model, prompts, name=name, counterfactual=chosen, seed=seed, prepend_bos=prepend_bos)
