"""`mechlens heads`: scores of attention heads on the command line."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mechlens.cli import options
from mechlens.cli.options import (
    BUNDLED,
    BosOption,
    CacheOption,
    ChatOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    QuietOption,
    RevisionOption,
    SeedOption,
    SeedsOption,
)
from mechlens.cli.output import deliver, file_of


def heads(
    model: ModelOption = BUNDLED,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", "-k", help="A score, such as induction_score; repeatable.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Score on this text instead of random tokens.")] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="List the heads at or above this (-1 to 1). [default: the highest ones]"),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many heads of each kind to list.")] = 5,
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Random tokens in one copy. [default: 50]")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences per seed. [default: 30]")] = None,
    jitter: Annotated[
        int | None, typer.Option(min=0, help="Up to this many random tokens between the copies. [default: 0]")
    ] = None,
    seed: SeedOption = 0,
    n_seeds: SeedsOption = 5,
    chat: ChatOption = False,
    bos: BosOption = None,
    out: Annotated[Path | None, typer.Option(help="Save to this .safetensors or .csv file.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score every attention head: induction, previous token, duplicate token and first token, on repeated
    random tokens or on a text; prefix matching and copying on random tokens."""
    given = dict(locals())
    options.check_file(out, (".safetensors", ".csv"))
    options.check_chat(chat, bos)
    if chat and text is None:
        raise ValueError("--chat is about a text: add --text")
    if threshold is not None and not -1 <= threshold <= 1:
        raise ValueError(f"--threshold must lie between -1 and 1, as all scores do, but is {threshold}")
    if text is not None:
        for name, value in (("--seq-len", seq_len), ("--batch", batch), ("--jitter", jitter)):
            if value is not None:
                raise ValueError(f"{name} is about random tokens, but --text gives the tokens: leave it out")
    from mechlens.analyses.heads import (
        KINDS,
        ON_PROMPT,
        PROMPT_KINDS,
        VARIANTS,
        detect_heads,
        score_heads,
        score_heads_on,
    )
    from mechlens.arguments import names_of

    # before the model is loaded, which takes seconds
    if kind:
        names_of("score", kind, (*KINDS, *VARIANTS) if text is None else PROMPT_KINDS)
    loaded = options.load(model, device, dtype, revision, quiet, cache=cache)
    if text is None:
        found = score_heads(
            loaded,
            kind,
            seq_len=seq_len or 50,
            batch=batch or 30,
            seeds=range(seed, seed + n_seeds),
            prepend_bos=bos,
            jitter=jitter or 0,
            progress=options.progress(quiet),
        )
    else:
        found = score_heads_on(loaded, options.prompt(loaded, text, chat), kind or ON_PROMPT, prepend_bos=bos)
    from mechlens import terminal

    listed = {
        name: len(detect_heads(found, name, threshold)) if threshold is not None else top
        for name in found.kinds
    }
    deliver(
        given,
        save=file_of([found]),
        tables=lambda: terminal.print_heads(found, listed),
        as_object=lambda: {"model": asdict(found.model), "heads": terminal.best_heads(found, listed)},
    )
