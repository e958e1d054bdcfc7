"""`mechlens heads`."""

from __future__ import annotations

from typing import Annotated

import typer

from mechlens.cli import options
from mechlens.cli.options import BosOption, ChatOption, SeedOption, SeedsOption
from mechlens.cli.run import PAGE, TABLE, WHOLE, Run, command


@command("heads", endings=(PAGE, TABLE, WHOLE), renamed={"kinds": "--kind"})
def heads(
    run: Run,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", "-k", help="Score, such as induction_score; repeatable.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Score on this text instead of random tokens.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=-1, max=1, help="List heads with at least this score. [default: the highest ones]"),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of heads to list for each score.")] = 5,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Random tokens per copy. [default: 50]")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences per seed. [default: 30]")] = None,
    jitter: Annotated[
        int | None, typer.Option(min=0, help="Maximum of random tokens between the copies. [default: 0]")
    ] = None,
    seed: SeedOption = 0,
    n_seeds: SeedsOption = 5,
    chat: ChatOption = False,
    bos: BosOption = None,
) -> None:
    """Score every attention head: induction, previous token, duplicate token, first token and attention sink,
    on repeated random tokens or on a text; prefix matching and copying on random tokens."""
    if chat and text is None:
        raise ValueError("--chat needs --text")
    for name, value in (("--seq-len", seq_len), ("--batch", batch), ("--jitter", jitter)):
        if text is not None and value is not None:
            raise ValueError(f"{name} is for random tokens, but --text gives the tokens: leave it out")
    from mechlens.analyses.heads.kinds import KINDS, PROMPT_KINDS, VARIANTS
    from mechlens.analyses.heads.scores import score_heads
    from mechlens.arguments import names_of
    from mechlens.text.prompts import RepeatedTokens

    # before the model is loaded, which takes seconds
    if kind:
        names_of("score", kind, (*KINDS, *VARIANTS) if text is None else PROMPT_KINDS)
    model = run.load()
    if text is None:
        seeds = range(seed, seed + n_seeds)
        on = RepeatedTokens(seq_len or 50, batch or 30, seeds, jitter or 0, prepend_bos=bos)
        found = score_heads(model, on, kind or None, progress=run.progress)
    else:
        found = score_heads(model, options.prompt(model, text, chat), kind or None, prepend_bos=bos)
    listed = {
        name: top if threshold is None else len(found.clear_heads(name, threshold, times_null=0))
        for name in found.kinds
    }
    run.show(found, top=listed)
