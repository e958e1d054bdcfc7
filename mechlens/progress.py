"""Progress bars: shown in terminals and notebooks, hidden when output is redirected."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

_hidden = ContextVar("hidden", default=False)
DELAY = 1.0
"""Seconds before a bar appears, unless it was explicitly asked for."""


@contextmanager
def no_bars() -> Iterator[None]:
    """Show no bars in this context, except those explicitly asked for."""
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


def progress_bar(
    work: Iterable[Any] | None = None, *, desc: str, progress: bool | None, unit: str = "run", **options: Any
) -> tqdm[Any]:
    """A progress bar over an iterable, or one to update by hand.

    Args:
        progress: whether to show the bar. None shows it in terminals and Jupyter if the work takes longer
            than a second, and removes it at the end.
    """
    if progress is None:
        options |= {"delay": DELAY, "leave": False}
    wanted = _is_watched() if progress is None else progress
    return tqdm(work, desc=desc, unit=unit, disable=not wanted, **options)


def announce(text: str, *, seconds: float, progress: bool | None) -> None:
    """Print one line to standard error before work that has a progress bar.

    Args:
        seconds: how long the work will take; with `progress=None`, short work is not announced.
        progress: as in `progress_bar`.
    """
    if progress or (progress is None and seconds > DELAY and _is_watched()):
        tqdm.write(text, file=sys.stderr)


def duration(seconds: float) -> str:
    """A time in words: in seconds if under a minute, otherwise in minutes."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.{0 if seconds >= 600 else 1}f} minutes"


def _is_watched() -> bool:
    """Whether bars are not hidden, and this is Jupyter or standard error is a terminal."""
    if _hidden.get():
        return False
    python = sys.modules.get("IPython")
    shell = None if python is None else python.get_ipython()
    return hasattr(shell, "kernel") or (sys.stderr is not None and sys.stderr.isatty())
