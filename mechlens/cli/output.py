"""Save a result, print it, and report what was saved."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechlens.cli import finishing

if TYPE_CHECKING:
    import pandas as pd


class NotSavedError(Exception):
    """The result could not be saved where the user asked; the message says where it is."""


def say(text: str) -> None:
    """Print one line to standard error."""
    print(f"mechlens: {' '.join(line.strip() for line in text.splitlines())}", file=sys.stderr)


def deliver(
    given: Mapping[str, Any],
    *,
    save: Callable[[Path], Sequence[Path]],
    tables: Callable[[], None],
    as_object: Callable[[], Any],
    frame: Callable[[], pd.DataFrame] | None = None,
) -> None:
    """Save a result, and print it as the user asked.

    The result is saved first, because the reader of a pipe may leave early, and printed in any case. If it
    cannot be saved where asked, it is saved in the system's temporary folder.

    Args:
        given: the command's arguments, among them `out`, `quiet`, `as_json` and optionally `as_csv`.
        save: writes to `out`, or to a file with the same name elsewhere, and returns the paths it wrote.
        tables: prints them.
        as_object: what `--json` prints.
        frame: what `--csv` prints.

    Raises:
        NotSavedError: the result was saved elsewhere, or not at all.
    """
    if given.get("dry_run"):
        return
    out, failure, elsewhere = given["out"], None, None
    if out is not None:
        try:
            with finishing():
                written = save(out)
        except Exception as error:  # any error: the result must not be lost
            failure, elsewhere = error, _save_elsewhere(save, out)
    try:
        if given["as_json"]:
            from mechlens.show.terminal import print_json

            print_json(as_object())
        elif given.get("as_csv") and frame is not None:
            frame().to_csv(sys.stdout, index=False)
        elif not given["quiet"] or (failure is not None and elsewhere is None):
            tables()
    finally:
        if failure is not None:
            raise _not_saved(out, failure, elsewhere) from failure
    if out is not None and not given["quiet"]:
        more = f" and {len(written) - 1} other files" if len(written) > 1 else ""
        say(f"wrote {written[-1]}{more}")


def _save_elsewhere(save: Callable[[Path], Sequence[Path]], out: Path) -> Path | None:
    """Save the result in a temporary folder; return its path, or None if that fails, too."""
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="mechlens-"))
        save(folder / out.name)
    except Exception:
        if folder is not None:
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
        return None
    return folder / out.name


def _not_saved(out: Path, failure: Exception, elsewhere: Path | None) -> Exception:
    """The error that ends the command. One that does not concern the file system is returned unchanged."""
    start = f"cannot write {out}: {getattr(failure, 'strerror', None) or failure}"
    if elsewhere is not None:
        return NotSavedError(f"{start}; the result is in {elsewhere}")
    if isinstance(failure, OSError):
        return NotSavedError(f"{start}; saving it in {tempfile.gettempdir()} failed, too")
    return failure
