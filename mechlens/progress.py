"""Progress bars: shown in terminals and notebooks, hidden when output is redirected.

A plan (`mechlens.plan`) runs only a few items of each loop that has a bar, and measures them.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

_hidden = ContextVar("hidden", default=False)
_runs: ContextVar[Runs | None] = ContextVar("runs", default=None)
_sampling: ContextVar[Sampling | None] = ContextVar("sampling", default=None)
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
    sampling = _sampling.get()
    if sampling is not None:
        return sampling.bar(work, desc, unit, options.get("total"), options.get("initial", 0))
    if progress is None:
        options |= {"delay": DELAY, "leave": False}
    wanted = _is_watched() if progress is None else progress
    return tqdm(work, desc=desc, unit=unit, disable=not wanted, **options)


@dataclasses.dataclass
class Loop:
    """A loop with a bar, of which a plan runs a part."""

    desc: str
    unit: str
    done: float = 0
    """Units that were run."""
    total: float | None = None
    """Units that there are; None if unknown."""
    began: tuple[float, ...] = ()
    """The readings of `Sampling.read` when it began, and after the last item that was run."""
    ended: tuple[float, ...] = ()

    @property
    def share(self) -> float:
        """How many times longer the whole loop is than the part that was run."""
        return max(1.0, self.total / self.done) if self.total and self.done else 1.0


class SampleEnded(Exception):
    """Enough was run of a loop that updates its bar by hand."""


class Sampling:
    """Runs a part of each loop that has a bar.

    Of a sequence, the part is spread over its whole length: items need not take equal time. Other loops are
    left early. The analysis goes on with what it has, so that later loops are measured, too.

    Args:
        measure: what is measured, as numbers that only grow.
        seconds: time for the part of each loop.
    """

    def __init__(self, measure: Callable[[], tuple[float, ...]], seconds: float) -> None:
        self.measure, self.seconds = measure, seconds
        self.loops: list[Loop] = []
        self._left_out = (0.0,) * len(measure())

    def __enter__(self) -> Sampling:
        self._token = _sampling.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _sampling.reset(self._token)

    @property
    def shortened(self) -> bool:
        """Whether any loop was left early."""
        return any(loop.share > 1 for loop in self.loops)

    def read(self) -> tuple[float, ...]:
        """What was measured, and what the parts that were left out would have added."""
        return tuple(map(sum, zip(self.measure(), self._left_out, strict=True)))

    def leave(self, loop: Loop) -> None:
        """Add what is left out of a loop; a loop around it sees the whole."""
        more = (
            (after - before) * (loop.share - 1) for before, after in zip(loop.began, loop.ended, strict=True)
        )
        self._left_out = tuple(map(sum, zip(self._left_out, more, strict=True)))

    def bar(
        self, work: Iterable[Any] | None, desc: str, unit: str, total: float | None, initial: float
    ) -> tqdm[Any]:
        loop = Loop(desc, unit, began=self.read(), ended=self.read())
        self.loops.append(loop)
        if isinstance(work, Sequence):
            loop.total = len(work)
            return tqdm(self._spread(work, loop), disable=True)
        return _Sampled(self, loop, work, total=total, initial=initial)

    def _spread(self, work: Sequence[Any], loop: Loop) -> Iterator[Any]:
        begun, left = time.perf_counter(), list(range(len(work)))
        while left:
            yield work[left.pop(0)]
            loop.done += 1
            loop.ended = self.read()
            each = (time.perf_counter() - begun) / loop.done
            more = int((self.seconds - each * loop.done) / each)
            if more < 1:
                break
            # those that are left, evenly spaced, the last one among them
            step = max(1.0, len(left) / more)
            left = [left[-1 - int(at * step)] for at in range(int(len(left) / step))][::-1]
        self.leave(loop)


class _Sampled(tqdm):
    """A bar that is updated by hand, in a plan."""

    def __init__(self, sampling: Sampling, loop: Loop, work: Iterable[Any] | None, **options: Any) -> None:
        super().__init__(work, disable=True, **options)
        self.sampling, self.loop, self.start = sampling, loop, time.perf_counter()
        self.first = options["initial"]

    def update(self, n: float | None = 1) -> None:
        """Note what was done.

        Raises:
            SampleEnded: enough of the loop was run.
        """
        loop = self.loop
        loop.done += n or 0
        loop.total = None if self.total is None else self.total - self.first
        loop.ended = self.sampling.read()
        if loop.share > 1 and time.perf_counter() - self.start > self.sampling.seconds:
            self.sampling.leave(loop)
            raise SampleEnded


class Runs:
    """A context that counts what models run."""

    model: Any = None
    """The model that ran last; None if none did."""
    runs = tokens = 0
    """Sequences, and their positions."""

    def __enter__(self) -> Runs:
        self._token = _runs.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _runs.reset(self._token)


def note_run(model: Any, rows: int, positions: int) -> None:
    """Count some sequences that a model runs."""
    counted = _runs.get()
    if counted is not None:
        counted.model = model
        counted.runs += rows
        counted.tokens += rows * positions


def planning() -> bool:
    """Whether this is a plan: files are then left alone."""
    return _sampling.get() is not None


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
