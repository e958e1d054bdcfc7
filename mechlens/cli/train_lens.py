"""`mechlens train-lens`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mechlens.cli import options
from mechlens.cli.options import BosOption, CorpusArgument, ResumeOption
from mechlens.cli.run import WHOLE, Run, command


@command("train-lens", endings=(WHOLE,))
def train_lens(
    run: Run,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write, for lens --tuned-lens.")],
    files: CorpusArgument = None,
    held_out_file: Annotated[
        list[str] | None, typer.Option(help="Text to measure on, instead of a part of FILES; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of optimizer steps.")] = 250,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens per step.")] = 1024,
    length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens per window. [default: 128, or the context if it is shorter]"),
    ] = None,
    held_out: Annotated[
        int | None, typer.Option(min=1, help="Windows to measure on. [default: a tenth, at most 64]")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Initial learning rate. [default: 0.5 / d_model]")
    ] = None,
    resume: ResumeOption = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Use the weights as trained, without folding LayerNorm or centering."),
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="Seed of the batches, and of text sampled from the model.")
    ] = 0,
    bos: BosOption = None,
) -> None:
    """Train a tuned lens: an affine map for each layer, so that the layer predicts what the model does.
    Prints how long it will take, then how far each row is from the model with and without its map. Without
    FILES, it trains on text sampled from the model."""
    options.check_resume(resume, out)
    options.check_corpus(files)
    options.check_corpus(held_out_file)
    from mechlens.analyses.tuned_lens import Training, train_tuned_lens
    from mechlens.text.corpus import token_windows

    training = Training(steps, batch_tokens, learning_rate, seed)
    model = run.load(processing=not raw)
    text = options.corpus(
        files, model, length=length, windows=None, bos=bos, seed=seed, quiet=run.given["quiet"]
    )
    others = [Path(file) for file in held_out_file] if held_out_file else None
    with options.saving_progress(resume):
        found = train_tuned_lens(
            model,
            token_windows(model, text, length=length, prepend_bos=bos),
            training=training,
            held_out=held_out,
            held_out_corpus=others and token_windows(model, others, length=length, prepend_bos=bos),
            resume=resume,
            progress=run.progress,
        )
    run.show(found)
