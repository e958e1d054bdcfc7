"""What the commands share: their options, and the steps that every one of them takes."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mechlens.models.protocol import LensModel

BUNDLED = "mechlens-books"

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="Bundled name, Hugging Face name or local directory.")
]
DeviceOption = Annotated[
    str | None, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps. [default: cpu]")
]
DtypeOption = Annotated[str, typer.Option(help="Of the weights: float32, bfloat16, float16, float64.")]
RevisionOption = Annotated[str | None, typer.Option(help="Revision of a Hugging Face model.")]
SeedOption = Annotated[
    int, typer.Option(min=0, max=2**31, help="The first of the random seeds; the others follow it.")
]
SeedsOption = Annotated[int, typer.Option("--n-seeds", min=1, help="How many seeds.")]
LengthOption = Annotated[int, typer.Option(min=1, help="Random tokens in one copy.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Sequences per seed.")]
BosOption = Annotated[
    bool | None, typer.Option("--bos/--no-bos", help="Prepend BOS. [default: where the model has one]")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars and no tables.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def load(
    name: str,
    device: str | None,
    dtype: str,
    revision: str | None,
    quiet: bool,
    *,
    checkpoint: int | None = None,
    processing: bool = True,
) -> LensModel:
    if progress(quiet):
        typer.echo(f"loading {name} ...", err=True)
    from mechlens.models.load import load_model

    return load_model(
        name, device=device, dtype=dtype, revision=revision, checkpoint=checkpoint, processing=processing
    )


def numbers(option: str, given: Sequence[str]) -> list[int]:
    """Single numbers, and ranges without their end; a range from -20 without an end is the last 20."""
    found: list[int] = []
    for each in given:
        first, colon, end = each.partition(":")
        try:
            start = int(first or 0)
            some = range(start, int(end or 0) if colon else start + 1)
        except ValueError:
            some = range(0)
        if not some:
            raise ValueError(
                f"{option} is a number, or a range such as 10:40 or -20: that has some, but is {each!r}"
                + (": repeat the option for several" if "," in each else "")
            )
        found += some
    return found


def command(name: str, options: Mapping[str, tuple[Any, Any]], *, argument: str | None = None) -> str:
    """The command line that does the same: every option that is not at its default, quoted for a shell.

    Args:
        name: such as `lens` or `ablate heads`.
        options: value and default of each; a list is an option that is repeated.
        argument: what stands without an option's name; after `--` where it looks like one.
    """
    words = ["mechlens", *name.split()]
    for option, (value, default) in options.items():
        if value == default:
            continue
        for each in value if isinstance(value, list) else [value]:
            words += [option] if each is True else [option, str(each)]
    if argument is not None:
        words += ["--", argument] if argument.startswith("-") else [argument]
    return shlex.join(words)


def progress(quiet: bool) -> bool:
    return not quiet and sys.stderr.isatty()


def check_file(out: Path, endings: Sequence[str]) -> None:
    if out.suffix not in endings:
        raise ValueError(f"--out is a {' or '.join(endings)} file, but it is {out}")
    if out.is_dir() or not out.parent.is_dir():
        what = "it is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise ValueError(f"cannot save to {out}: {what}")


def check_state(state: Path | None, out: Path | None) -> None:
    """Say so before the work is done; progress is not saved where the result is to be, either."""
    from mechlens.results.state import state_file

    state_file(state)
    if state is not None and out is not None and state.resolve() == out.resolve():
        raise ValueError(f"--out and --state are the same file {out}: give two")


@contextlib.contextmanager
def saving_progress(state: Path | None) -> Iterator[None]:
    """Say what Ctrl-C leaves behind."""
    try:
        yield
    except KeyboardInterrupt:
        if state is not None:
            # what a terminal writes for the keys stands in the same line
            typer.echo(
                f"\nmechlens: progress is saved in {state}: the same command goes on from there"
                if state.is_file()
                else f"\nmechlens: stopped before there was progress to save in {state}",
                err=True,
            )
        raise


def check_folder(folder: Path) -> None:
    """Say so before the work is done, not after it, when its results could not be saved."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--out is a folder, but {existing} is a file")
