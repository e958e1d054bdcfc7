"""`mechlens reproduce`: published findings and those on a model's card, on the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechlens.cli import options
from mechlens.cli.options import (
    BUNDLED,
    BatchOption,
    BosOption,
    CacheOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LengthOption,
    ModelOption,
    QuietOption,
    RevisionOption,
    SeedOption,
    SeedsOption,
)
from mechlens.cli.output import deliver
from mechlens.published import STUDIES

if TYPE_CHECKING:
    from mechlens.studies.findings import Findings


def reproduce(
    studies: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[STUDY]...",
            help=f"{', '.join(STUDIES)}. [default: heads, and all that the model's card has figures of]",
        ),
    ] = None,
    model: ModelOption = BUNDLED,
    out: Annotated[Path, typer.Option(help="Folder for results, tables and report.html.")] = Path(
        "reproduce"
    ),
    seq_len: LengthOption = 50,
    batch: BatchOption = 30,
    seed: SeedOption = 0,
    n_seeds: SeedsOption = 3,
    bos: BosOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    cache: CacheOption = True,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Reproduce what was found on a model: induction heads, facts, circuits, the indirect object, features.
    Prints published beside measured figures and writes results (.safetensors), tables (.csv) and report.html.
    --seq-len, --batch, --seed, --n-seeds and --bos are those of the study heads."""
    given = dict(locals())
    for each in studies or ():
        options.check_known("STUDY", each, STUDIES)
    options.check_folder(out)
    loaded = options.load(model, device, dtype, revision, quiet, cache=cache)
    from mechlens.models.protocol import describe
    from mechlens.show.reproduction import write_findings
    from mechlens.studies.findings import planned, reproduce_findings

    names = planned(describe(loaded), studies or None)
    if len(names) > 1 and options.progress(quiet):
        print(f"studies: {', '.join(names)}", file=sys.stderr)
    found = reproduce_findings(
        loaded,
        names,
        raw=lambda: options.load(model, device, dtype, revision, quiet, processing=False, cache=cache),
        heads={
            "seq_len": seq_len,
            "batch": batch,
            "seeds": range(seed, seed + n_seeds),
            "prepend_bos": bos,
        },
        progress=options.progress(quiet),
    )
    command = options.command("reproduce", reproduce, given)
    written: list[Path] = []

    def save(folder: Path) -> list[Path]:
        written[:] = write_findings(found, folder, command=command)
        return written

    deliver(
        given,
        save=save,
        tables=lambda: _print(found),
        as_object=lambda: _as_object(found, written),
    )


def _print(found: Findings) -> None:
    from mechlens import terminal
    from mechlens.show.page import verdict_statement
    from mechlens.studies.heads import Reproduction, has_card

    model = next(iter(found.results.values())).model
    for study in found.studies.values():
        if isinstance(study, Reproduction):
            terminal.print_estimates(study.performance)
            terminal.print_heads(study.heads, 3)
    if not found.comparisons:
        print(f"No published figures of {model.name} at these settings to compare with.")
        return
    own = has_card(model)
    terminal.print_rows(
        f"{model.name} against {'its model card' if own else 'published figures'}",
        ("claim", "on the card" if own else "published", "measured", "tolerance", "verdict"),
        [
            (
                each.claim,
                terminal.number(each.published),
                terminal.number(each.measured),
                terminal.tolerance(each.low, each.high),
                each.verdict,
            )
            for each in found.comparisons
        ],
    )
    print(verdict_statement(found.comparisons))


def _as_object(found: Findings, written: Sequence[Path]) -> dict[str, Any]:
    from mechlens.studies.heads import Reproduction
    from mechlens.terminal import best_heads

    about: dict[str, Any] = {"model": asdict(next(iter(found.results.values())).model)}
    for study in found.studies.values():
        if isinstance(study, Reproduction):
            about |= {"estimates": study.performance.estimates, "heads": best_heads(study.heads, 5)}
    return about | {
        "comparisons": [asdict(comparison) for comparison in found.comparisons],
        "written": [str(path) for path in written],
    }
