"""`mechlens induction-circuits`: pairs of heads with the evidence for them, on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mechlens.cli import options
from mechlens.cli.options import (
    BUNDLED,
    BosOption,
    CacheOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    QuietOption,
    RevisionOption,
)
from mechlens.cli.output import deliver, file_of

if TYPE_CHECKING:
    from mechlens.show.section import Section

_ENDINGS = (".html", ".csv", ".safetensors")


def induction_circuits(
    model: ModelOption = BUNDLED,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            "--pair",
            help="Judge this pair, such as 4.11,5.5 (previous, induction); repeatable. [default: find]",
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="What both scores of a pair must reach.")
    ] = 0.4,
    per_head: Annotated[
        int, typer.Option(min=1, help="Previous-token heads to try for each induction head.")
    ] = 3,
    how: Annotated[
        str, typer.Option(help="What is in an ablated head's place: mean, resample or zero.")
    ] = "mean",
    all_tokens: Annotated[
        bool,
        typer.Option("--all-tokens", help="Count top-1 accuracies over the whole vocabulary, not a sample."),
    ] = False,
    seq_len: Annotated[int, typer.Option(min=2, help="Random tokens in one copy.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of random tokens.")] = 8,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="Of the random tokens, and of the sample of the vocabulary.")
    ] = 0,
    bos: BosOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Save to this .html (a page), .csv or .safetensors file.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the previous-token heads that induction heads work with, and print what speaks for each pair: how
    the two attend, what their weights say, and what is lost without the one in the other's keys."""
    given = dict(locals())
    options.check_file(out, _ENDINGS)
    options.check_known("--how", how, options.ABLATIONS)
    pairs = [_pair(each) for each in pair or []]
    loaded = options.load(model, device, dtype, revision, quiet, cache=cache)
    from mechlens.analyses.circuits.induction import N_TOKENS, find_induction_circuits

    found = find_induction_circuits(
        loaded,
        pairs=pairs or None,
        threshold=threshold,
        per_head=per_head,
        seq_len=seq_len,
        batch=batch,
        seed=seed,
        how=how,
        n_tokens=None if all_tokens else N_TOKENS,
        prepend_bos=bos,
        progress=options.progress(quiet),
    )
    from mechlens import terminal

    def sections() -> list[Section]:
        from mechlens.show.induction_circuits import induction_circuits_section

        return [induction_circuits_section(found)]

    command = options.command("induction-circuits", induction_circuits, given)
    deliver(
        given,
        save=file_of([found], title="Induction circuits", sections=sections, command=command),
        tables=lambda: terminal.print_induction_circuits(found),
        as_object=lambda: terminal.induction_circuits_json(found),
    )


def _pair(text: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two heads that are written with a comma between them."""
    from mechlens.results import parse_head

    parts = text.split(",")
    if len(parts) != 2:
        raise ValueError(f"--pair is two heads with a comma between, such as 4.11,5.5, but is {text!r}")
    previous, induction = (parse_head(part.strip()) for part in parts)
    return previous, induction
