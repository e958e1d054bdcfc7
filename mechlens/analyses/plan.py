"""Plan an analysis before it runs: how many runs, how much arithmetic and memory, how long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mechlens.arguments import check_reals
from mechlens.errors import ArgumentError
from mechlens.models.protocol import describe
from mechlens.models.run.meter import Meter
from mechlens.progress import Runs, SampleEnded, Sampling, no_bars
from mechlens.results import Plan

SECONDS = 1.5
"""How long a part of each loop runs; twice, because it is slower while it is counted."""


def plan(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """Measure what an analysis would take, without running all of it.

    Of each loop with a progress bar, a part is run twice, for about 1.5 seconds each: once to count, once to
    take the time. What was measured is scaled to the whole loop. The analysis goes on with what it has, so
    later loops are measured, too, although their input is incomplete. Files are not written.

    Args:
        function: an analysis, such as `mechlens.score_heads` or `task.circuit`.
        args, kwargs: its arguments.

    Returns:
        Runs, tokens, FLOP, bytes and seconds of the whole analysis; `.words` says it in a sentence.

    Raises:
        Exception: what the analysis raises for these arguments.

    Example:
        >>> task = mechlens.load_task("agreement", model, n=4)
        >>> mechlens.plan(task.circuit, ["L2", "L3"], n_random=50).runs > 400
        True

    Cost: about 3 seconds for each loop that takes longer, and whatever comes before it twice.
    """
    return measured(lambda: function(*args, **kwargs), _name(function), _given(function, args, kwargs))


def measured(
    work: Callable[[], Any], analysis: str, given: Iterable[Any] = (), *, seconds: float = SECONDS
) -> Plan:
    """`plan` of a function without arguments.

    Args:
        given: where to look for a model if the analysis runs none.
        seconds: time for the part of each loop.
    """
    check_reals(seconds=seconds)
    meter, ran = Meter(), Runs()
    counting = Sampling(lambda: (ran.runs, ran.tokens, meter.flop), seconds)
    with meter, ran:
        note = _run(work, counting)
    timing = Sampling(lambda: (time.perf_counter(),), seconds)
    (begun,) = timing.read()
    _run(work, timing)
    taken = timing.read()[0] - begun
    runs, tokens, flop = counting.read()
    model = ran.model or next((each for each in given if hasattr(each, "W_U")), None)
    if model is None:
        raise ArgumentError("function", "an analysis of a model", analysis)
    loops = {
        f"{each.unit}s ({each.desc})": (each.done, each.total or 0) for each in timing.loops if each.share > 1
    }
    return Plan(
        model=describe(model),
        analysis=analysis,
        runs=round(runs),
        tokens=round(tokens),
        flop=float(flop),
        bytes=meter.peak,
        seconds=taken,
        loops=loops,
        note=note,
    )


def _run(work: Callable[[], Any], sampling: Sampling) -> str:
    """Run a part of some work; return what could not be measured, in words."""
    with sampling, no_bars():
        try:
            work()
        except SampleEnded:
            pass
        except Exception as error:
            # a part of a loop need not be enough for what comes after it
            if not sampling.shortened:
                raise
            last = sampling.loops[-1].desc
            return f"What comes after the loop “{last}” is not in it ({type(error).__name__})"
    return ""


def _name(function: Callable[..., Any]) -> str:
    owner = type(function.__self__).__name__ + "." if hasattr(function, "__self__") else ""
    return owner + getattr(function, "__name__", type(function).__name__)


def _given(function: Callable[..., Any], args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    owner = getattr(function, "__self__", None)
    return [getattr(owner, "model", None), *args, *kwargs.values()]
