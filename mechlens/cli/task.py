"""`mechlens task` and `mechlens task-circuit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mechlens.cli import options
from mechlens.cli.options import BosOption
from mechlens.cli.run import PAGE, Run, command

if TYPE_CHECKING:
    from mechlens.analyses.tasks import Task

TASKS = ("ioi", "greater-than", "agreement", "capitals", "gender", "docstring", "induction")
"""Repeated here, so that another name is refused before torch is imported."""
BY = ("resample", "mean", "zero")
METRICS = ("logit_diff", "probability_diff")

TaskArgument = Annotated[
    str,
    typer.Argument(
        help=f"{options.one_of(TASKS)}; or a .csv or .jsonl file with columns clean, corrupted, answer, "
        "wrong and role_..."
    ),
]
NumberOption = Annotated[
    int | None, typer.Option("--n", min=1, help="Number of prompts of a built-in task. [default: 64]")
]
CounterfactualOption = Annotated[
    str | None, typer.Option(help="How corrupted prompts differ; for ioi: swap-subject or other-names.")
]
TaskSeedOption = Annotated[
    int | None, typer.Option(min=0, max=2**31, help="Seed of a built-in task's prompts. [default: 0]")
]


@command("task", without=("dry_run",))
def task(
    run: Run,
    name: TaskArgument,
    n: NumberOption = None,
    counterfactual: CounterfactualOption = None,
    top: Annotated[int, typer.Option(min=1, help="Number of prompts to list.")] = 5,
    seed: TaskSeedOption = None,
    bos: BosOption = None,
) -> None:
    """Measure how well the model does a task, such as naming the indirect object: accuracy and logit
    difference with intervals, against chance and on corrupted prompts."""
    _check(run)
    run.show(_task(run).performance(), top=top)


@command("task-circuit", endings=(PAGE,))
def task_circuit(
    run: Run,
    name: TaskArgument,
    share: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Share of edges to keep. [default: the smallest of ten with faithfulness 0.8]"
        ),
    ] = None,
    by: Annotated[str, typer.Option(help=f"What the other edges carry: {options.one_of(BY)}.")] = "resample",
    metric: Annotated[str, typer.Option(help=f"{options.one_of(METRICS)}.")] = "logit_diff",
    steps: Annotated[
        int, typer.Option(min=1, help="Gradients to average; 1 is plain attribution patching.")
    ] = 5,
    signed: Annotated[
        bool, typer.Option("--signed", help="Rank by signed effect, not by size: edges that help first.")
    ] = False,
    exact: Annotated[int, typer.Option(min=0, help="Edges to measure exactly as well.")] = 20,
    n_random: Annotated[
        int, typer.Option("--random", min=1, help="Random circuits of the same size to compare with.")
    ] = 10,
    n: NumberOption = None,
    counterfactual: CounterfactualOption = None,
    top: Annotated[int, typer.Option(min=1, help="Number of edges to list.")] = 10,
    seed: TaskSeedOption = None,
    bos: BosOption = None,
) -> None:
    """Find the edges between heads and MLPs that carry a task, and measure how faithful and complete this
    circuit is, beside random ones. Half of the prompts rank the edges, the other half measure the circuit."""
    _check(run)
    options.check_known("--by", by, BY)
    options.check_known("--metric", metric, METRICS)
    task = _task(run)
    from mechlens.analyses.tasks.search import find_circuit
    from mechlens.show.section import section

    made = find_circuit(
        task,
        share=share,
        by=by,
        metric=metric,
        steps=steps,
        absolute=not signed,
        exact=exact,
        n_random=n_random,
        progress=run.progress,
    )
    found = {name: each for name, each in made._asdict().items() if each is not None}
    run.show(
        *found.values(),
        names=tuple(found),
        sections=lambda: [section(each, top=top) for each in found.values()],
        title=made.circuit.title,
    )


def _check(run: Run) -> None:
    """Refuse an unknown task, and options that have no effect on a file of prompts."""
    name = run.given["name"]
    own = bool(Path(name).suffix)
    if not own:
        options.check_known("NAME", name, TASKS)
    for argument in ("n", "seed", "counterfactual"):
        if own and run.given[argument] is not None:
            raise ValueError(f"--{argument} is for a built-in task, but {name} has the prompts: leave it out")


def _task(run: Run) -> Task:
    name, bos, counterfactual = (run.given[each] for each in ("name", "bos", "counterfactual"))
    model = run.load()
    from mechlens.analyses.tasks import Task, load_task

    if Path(name).suffix:
        return Task.from_file(name, model, prepend_bos=bos)
    n, seed = run.given["n"] or 64, run.given["seed"] or 0
    return load_task(name, model, n=n, seed=seed, counterfactual=counterfactual, prepend_bos=bos)
