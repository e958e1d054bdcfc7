"""The `mechlens` command.

Importing this module imports almost nothing, so Ctrl-C is handled from the start. `commands` imports only
the command that is called, and that imports what it needs.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

STOPPED = 130
"""The exit code after Ctrl-C, as in shells."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0 for success; 1 if the result could not be saved where asked, or not printed completely;
    2 for invalid input, with one line on standard error; 130 after Ctrl-C.
    """
    try:
        with _on_ctrl_c(_end_at_once):
            from mechlens.cli.commands import run

            code = run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt as stopped:
        code = STOPPED
        print(_last_line(str(stopped)), file=sys.stderr)
    # only Python's own shutdown is left, which would print a traceback for Ctrl-C
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """Make Ctrl-C raise KeyboardInterrupt in the block, for work that saves its progress or writes files.

    Elsewhere Ctrl-C ends the process at once, because many packages swallow exceptions while they are
    imported, or turn them into others.
    """
    with _on_ctrl_c(signal.default_int_handler):
        yield


@contextlib.contextmanager
def _on_ctrl_c(handler: Any) -> Iterator[None]:
    try:
        before = signal.signal(signal.SIGINT, handler)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end_at_once(*_: object) -> NoReturn:
    with contextlib.suppress(OSError):
        # not through sys.stderr, which may be in the middle of a write
        os.write(2, f"{_last_line()}\n".encode())
    os._exit(STOPPED)


def _last_line(what: str = "") -> str:
    # a terminal has printed ^C
    newline = "\n" if os.isatty(2) else ""
    return f"{newline}mechlens: {what or 'interrupted'}"
