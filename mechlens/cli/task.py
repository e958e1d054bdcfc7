"""`mechlens task`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mechlens.cli import options
from mechlens.cli.options import BosOption
from mechlens.cli.run import Run, command

TASKS = ("ioi", "greater-than", "agreement", "capitals", "gender", "docstring")
"""Repeated here, so that an unknown name is refused before torch is imported."""


@command("task")
def task(
    run: Run,
    name: Annotated[
        str,
        typer.Argument(
            help=f"{options.one_of(TASKS)}; or a .csv or .jsonl file with columns clean, corrupted, answer, "
            "wrong and role_..."
        ),
    ],
    n: Annotated[
        int | None, typer.Option("--n", min=1, help="Number of prompts of a built-in task. [default: 64]")
    ] = None,
    counterfactual: Annotated[
        str | None, typer.Option(help="How corrupted prompts differ; for ioi: swap-subject or other-names.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of prompts to list.")] = 5,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**31, help="Seed of a built-in task's prompts. [default: 0]")
    ] = None,
    bos: BosOption = None,
) -> None:
    """Measure how well the model does a task, such as naming the indirect object: accuracy and logit
    difference with intervals, against chance and on corrupted prompts."""
    own = bool(Path(name).suffix)
    if not own:
        options.check_known("NAME", name, TASKS)
    for option, given in (("--n", n), ("--seed", seed), ("--counterfactual", counterfactual)):
        if own and given is not None:
            raise ValueError(f"{option} is for a built-in task, but {name} has the prompts: leave it out")
    model = run.load()
    from mechlens.analyses.tasks import Task, load_task

    if own:
        found = Task.from_file(name, model, prepend_bos=bos)
    else:
        found = load_task(
            name, model, n=n or 64, seed=seed or 0, counterfactual=counterfactual, prepend_bos=bos
        )
    run.show(found.performance(), top=top)
