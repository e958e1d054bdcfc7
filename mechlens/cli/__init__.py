"""The `mechlens` command: parses, calls, prints.

It imports almost nothing, so that Ctrl-C finds it ready. `commands` imports the command that is called, and
that imports what it needs.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Exit codes: 0 when all is done; 1 when the work was done but its result could not be written where it
    should be, or printed to the end; 2 for wrong input, refused in one line on standard error; 130 after
    Ctrl-C.
    """
    try:
        from mechlens.cli.commands import run

        code = run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt as stopped:
        code = _stopped(stopped)
    sys.exit(code)


def _stopped(stopped: KeyboardInterrupt) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # a terminal has written ^C for the keys
    start = "\n" if sys.stderr.isatty() else ""
    print(f"{start}mechlens: {stopped or 'interrupted'}", file=sys.stderr)
    return 130
