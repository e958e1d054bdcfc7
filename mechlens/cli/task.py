"""`mechlens task`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mechlens.cli.options import BosOption, SeedOption
from mechlens.cli.run import Run, command


@command("task")
def task(
    run: Run,
    name: Annotated[
        str,
        typer.Argument(
            help="ioi, greater-than, agreement, capitals, gender or docstring; or a .csv or .jsonl file with "
            "columns clean, corrupted, answer, wrong and role_..."
        ),
    ],
    n: Annotated[int, typer.Option("--n", min=1, help="Number of prompts of a built-in task.")] = 64,
    counterfactual: Annotated[
        str | None, typer.Option(help="How corrupted prompts differ; for ioi: swap-subject or other-names.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of prompts to list.")] = 5,
    seed: SeedOption = 0,
    bos: BosOption = None,
) -> None:
    """Measure how well the model does a task, such as naming the indirect object: accuracy and logit
    difference with intervals, against chance and on corrupted prompts."""
    model = run.load()
    from mechlens.analyses.tasks import Task, load_task

    if Path(name).suffix:
        found = Task.from_file(name, model, prepend_bos=bos)
    else:
        found = load_task(name, model, n=n, seed=seed, counterfactual=counterfactual, prepend_bos=bos)
    run.show(found.performance(), top=top)
