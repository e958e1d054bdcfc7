"""`mechlens reproduce`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mechlens.cli import options
from mechlens.cli.options import BatchOption, BosOption, LengthOption, SeedOption, SeedsOption
from mechlens.cli.output import deliver
from mechlens.cli.run import Run, command
from mechlens.studies import STUDIES


@command("reproduce", endings=(), renamed={"names": "STUDY"})
def reproduce(
    run: Run,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STUDY]...",
            help=f"{', '.join(STUDIES)}. [default: heads, and the studies for which the model's card lists "
            "figures]",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results, tables and report.html.")] = Path(
        "reproduce"
    ),
    seq_len: LengthOption = 50,
    batch: BatchOption = 30,
    seed: SeedOption = 0,
    n_seeds: SeedsOption = 3,
    bos: BosOption = None,
    against: Annotated[
        str | None, typer.Option(help="For feature-search: a model of another size with the same tokenizer.")
    ] = None,
) -> None:
    """Run studies of published findings on a model: induction heads, the logit lens, patching of MLPs,
    circuits, facts, the indirect object, features. Prints measured numbers beside published ones, and writes
    results (.safetensors), tables (.csv) and report.html. --seq-len, --batch, --seed, --n-seeds and --bos
    apply to the study heads."""
    for each in names or ():
        options.check_known("STUDY", each, list(STUDIES))
    options.check_folder(out)
    model = run.load()
    from mechlens.models.protocol import describe
    from mechlens.studies.reproduce import planned
    from mechlens.studies.reproduce import reproduce as reproduced
    from mechlens.text.prompts import RepeatedTokens

    if run.progress:
        print(f"studies: {', '.join(planned(describe(model), names or ()))}", file=sys.stderr)
    found = reproduced(
        model,
        *(names or ()),
        heads=RepeatedTokens(seq_len, batch, range(seed, seed + n_seeds), prepend_bos=bos),
        raw=lambda: run.load(processing=False),
        against=None if against is None else run.load(processing=False, other=against),
        progress=run.progress,
    )
    written: list[Path] = []

    def save(folder: Path) -> list[Path]:
        written[:] = found.save(folder, command=run.line)
        return written

    def tables() -> None:
        from mechlens.show.terminal import print_comparisons, print_section

        for section in found.sections():
            print_section(section)
        print_comparisons(found.comparisons)

    deliver(
        run.given,
        save=save,
        tables=tables,
        as_object=lambda: {
            "model": asdict(found.model),
            "studies": list(found.studies),
            "comparisons": [asdict(each) for each in found.comparisons],
            "written": [str(path) for path in written],
        },
    )
