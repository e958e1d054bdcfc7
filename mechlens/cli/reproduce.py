"""`mechlens reproduce`: the published findings on induction heads, on the command line."""

from __future__ import annotations

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

if TYPE_CHECKING:
    from mechlens.studies.reproduce import Reproduction


def reproduce(
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
    """Reproduce the induction-head findings on a model: how well it continues repeated random tokens, and
    which of its heads do that. Prints published beside measured figures and writes results (.safetensors),
    tables (.csv) and report.html."""
    given = dict(locals())
    options.check_folder(out)
    loaded = options.load(model, device, dtype, revision, quiet, cache=cache)
    from mechlens.report.reproduction import write_reproduction
    from mechlens.studies.reproduce import reproduce as study

    found = study(
        loaded,
        seq_len=seq_len,
        batch=batch,
        seeds=range(seed, seed + n_seeds),
        prepend_bos=bos,
        progress=options.progress(quiet),
    )
    command = options.command("reproduce", reproduce, given)
    written: list[Path] = []

    def save(folder: Path) -> list[Path]:
        written[:] = write_reproduction(found, folder, command=command)
        return written

    deliver(
        given,
        save=save,
        tables=lambda: _print(found),
        as_object=lambda: _as_object(found, written),
    )


def _print(found: Reproduction) -> None:
    from mechlens import terminal
    from mechlens.report.page import verdict_statement

    name = found.heads.model.name
    terminal.print_estimates(found.performance)
    terminal.print_heads(found.heads, 3)
    if not found.comparisons:
        print(f"No published figures of {name} at these settings to compare with.")
        return
    bundled = name == BUNDLED
    terminal.print_table(
        f"{name} against {'its model card' if bundled else 'published figures'}",
        ("claim", "on the card" if bundled else "published", "measured", "tolerance", "verdict"),
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


def _as_object(found: Reproduction, written: Sequence[Path]) -> dict[str, Any]:
    from mechlens.terminal import best_heads

    return {
        "model": asdict(found.heads.model),
        "estimates": found.performance.estimates,
        "comparisons": [asdict(comparison) for comparison in found.comparisons],
        "heads": best_heads(found.heads, 5),
        "written": [str(path) for path in written],
    }
