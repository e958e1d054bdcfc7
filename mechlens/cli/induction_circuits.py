"""`mechlens induction-circuits`."""

from __future__ import annotations

from typing import Annotated

import typer

from mechlens.cli import options
from mechlens.cli.options import BosOption
from mechlens.cli.run import Run, command


@command("induction-circuits")
def induction_circuits(
    run: Run,
    pair: Annotated[
        list[str] | None,
        typer.Option("--pair", help="Pair to test: previous,induction, such as 4.11,5.5; repeatable."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Minimum score of each head of a pair.")
    ] = 0.4,
    per_head: Annotated[
        int, typer.Option(min=1, help="Previous-token heads to try for each induction head.")
    ] = 3,
    how: Annotated[
        str, typer.Option(help="What replaces an ablated head's output: mean, resample or zero.")
    ] = "mean",
    all_tokens: Annotated[
        bool,
        typer.Option("--all-tokens", help="Measure top-1 accuracies on the whole vocabulary, not a sample."),
    ] = False,
    seq_len: Annotated[int, typer.Option(min=2, help="Random tokens per copy.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of random tokens.")] = 8,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="Seed of the random tokens and of the vocabulary's sample.")
    ] = 0,
    bos: BosOption = None,
) -> None:
    """Find the previous-token heads that feed induction heads. Prints the evidence for each pair: where both
    heads attend, how their weights compose, and the effect of ablating the first in the second's keys."""
    options.check_known("--how", how, options.ABLATIONS)
    pairs = [_pair(each) for each in pair or []]
    model = run.load()
    from mechlens.analyses.circuits.induction import N_TOKENS, find_induction_circuits
    from mechlens.text.prompts import RepeatedTokens

    found = find_induction_circuits(
        model,
        RepeatedTokens(seq_len, batch=batch, seeds=[seed], prepend_bos=bos),
        pairs=pairs or None,
        threshold=threshold,
        per_head=per_head,
        how=how,
        n_tokens=None if all_tokens else N_TOKENS,
        progress=run.progress,
    )
    run.show(found)


def _pair(text: str) -> tuple[tuple[int, int], tuple[int, int]]:
    from mechlens.results import parse_head

    parts = text.split(",")
    if len(parts) != 2:
        raise ValueError(
            f"--pair must be two heads with a comma between them, such as 4.11,5.5, got {text!r}"
        )
    previous, induction = (parse_head(part.strip()) for part in parts)
    return previous, induction
