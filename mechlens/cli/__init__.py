"""The `mechlens` command: parses, calls, prints.

It imports almost nothing, so that Ctrl-C finds it ready. `commands` imports the command that is called, and
that imports what it needs.
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
"""The exit code after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0 when all is done; 1 when the work was done but its result could not be written where it
    should be, or printed to the end; 2 for wrong input, refused in one line on standard error; 130 after
    Ctrl-C.
    """
    try:
        with _on_ctrl_c(_end_at_once):
            from mechlens.cli.commands import run

            code = run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt as stopped:
        code = STOPPED
        print(_last_line(str(stopped)), file=sys.stderr)
    # what is left is Python's own end, which has nothing to say about Ctrl-C
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """Within it Ctrl-C is a KeyboardInterrupt: for work that saves its progress, and files half written.

    Elsewhere it ends the process on the spot, since many packages lose an exception while they are imported,
    or make another one of it.
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
        # past the buffers of sys.stderr, which may be in the middle of something
        os.write(2, f"{_last_line()}\n".encode())
    os._exit(STOPPED)


def _last_line(what: str = "") -> str:
    # a terminal has written ^C for the keys
    newline = "\n" if os.isatty(2) else ""
    return f"{newline}mechlens: {what or 'interrupted'}"
