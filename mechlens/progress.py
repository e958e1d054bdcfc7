"""Progress bars: on where somebody watches, off where output is kept."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

DELAY = 1.0
"""Seconds after which work that nobody asked a bar of gets one."""


def progress_bar(
    work: Iterable[Any] | None = None, *, desc: str, progress: bool | None, unit: str = "run", **options: Any
) -> tqdm[Any]:
    """A bar over some work, or one that is moved by hand.

    Args:
        progress: True or False; None is a bar in a terminal and in Jupyter, for work that takes longer than a
            second, which is gone when the work is done.
    """
    if progress is None:
        options |= {"delay": DELAY, "leave": False}
    wanted = _is_watched() if progress is None else progress
    return tqdm(work, desc=desc, unit=unit, disable=not wanted, **options)


def announce(text: str, *, seconds: float, progress: bool | None) -> None:
    """One line on standard error before work begins, where there is a bar for it.

    Args:
        seconds: how long the work is going to take; where nobody asked for a bar, short work is not
            announced.
        progress: as for `progress_bar`.
    """
    if progress or (progress is None and seconds > DELAY and _is_watched()):
        tqdm.write(text, file=sys.stderr)


def spoken(seconds: float) -> str:
    """A time as people say it: seconds below a minute, else minutes."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.{0 if seconds >= 600 else 1}f} minutes"


def _is_watched() -> bool:
    """Whether this is Jupyter or standard error is a terminal."""
    python = sys.modules.get("IPython")
    shell = None if python is None else python.get_ipython()
    return hasattr(shell, "kernel") or (sys.stderr is not None and sys.stderr.isatty())
