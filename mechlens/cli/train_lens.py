"""`mechlens train-lens`: training a tuned lens on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mechlens.cli import options
from mechlens.cli.options import (
    BUNDLED,
    BosOption,
    CacheOption,
    CorpusArgument,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    QuietOption,
    ResumeOption,
    RevisionOption,
)
from mechlens.cli.output import deliver, file_of


def train_lens(
    out: Annotated[Path, typer.Option(help="The .safetensors file of the lens, for lens --tuned-lens.")],
    files: CorpusArgument = None,
    held_out_file: Annotated[
        list[str] | None,
        typer.Option(help="Text to measure on, instead of a part of FILES; repeatable."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = 250,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in each step's batch.")] = 1024,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a window. [default: 128, or what the model holds]")
    ] = None,
    held_out: Annotated[
        int | None, typer.Option(min=1, help="Windows to measure on. [default: a tenth, at most 64]")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the first step. [default: 0.5 / d_model]")
    ] = None,
    resume: ResumeOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Leave the weights as they were trained: fold and centre nothing.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="Of the batches, and of what the model writes itself.")
    ] = 0,
    model: ModelOption = BUNDLED,
    bos: BosOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train a tuned lens: for each layer an affine map after which it predicts what the model does. Says
    before how long it will take, and prints how far each row is from the model with and without its map.
    Without FILES it is trained on what the model writes itself."""
    given = dict(locals())
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        raise ValueError(f"--learning-rate must be a finite number above 0, but is {learning_rate}")
    options.check_file(out, (".safetensors",))
    options.check_resume(resume, out)
    options.check_corpus(files)
    options.check_corpus(held_out_file)
    loaded = options.load(model, device, dtype, revision, quiet, processing=not raw, cache=cache)
    from mechlens import terminal
    from mechlens.analyses.tuned_lens import train_tuned_lens

    text = options.corpus(files, loaded, length=length, windows=None, bos=bos, seed=seed, quiet=quiet)
    with options.saving_progress(resume):
        found = train_tuned_lens(
            loaded,
            text,
            steps=steps,
            batch_tokens=batch_tokens,
            length=length,
            learning_rate=learning_rate,
            held_out=held_out,
            held_out_corpus=[Path(file) for file in held_out_file] if held_out_file else None,
            seed=seed,
            prepend_bos=bos,
            resume=resume,
            progress=options.progress(quiet),
        )
    deliver(
        given,
        save=file_of([found]),
        tables=lambda: terminal.print_tuned_lens(found),
        as_object=lambda: terminal.tuned_lens_json(found),
    )
