"""Find a circuit on one half of a task's prompts, and measure it on the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mechlens.results.task_circuits import CircuitCurve, EdgeEffects, TaskCircuit

if TYPE_CHECKING:
    from mechlens.analyses.tasks.task import Task

FAITHFUL = 0.8
"""The faithfulness that a circuit must have if its size is not given."""


class FoundCircuit(NamedTuple):
    """How a circuit was found, and how good it is on other prompts."""

    edges: EdgeEffects
    """Of the first half of the prompts."""
    curve: CircuitCurve | None
    """Of the same prompts; None if the size was given."""
    circuit: TaskCircuit
    """Measured on the second half."""


def find_circuit(
    task: Task,
    *,
    share: float | None = None,
    by: str = "resample",
    metric: str = "logit_diff",
    steps: int = 5,
    absolute: bool = True,
    exact: int = 20,
    n_random: int = 10,
    progress: bool | None = None,
) -> FoundCircuit:
    """Rank edges on the first half of the prompts, and measure the most important ones on the second.

    Args:
        share: of all edges to keep. None takes the smallest size on the curve with a faithfulness of 0.8.
        by, metric, steps, exact: as in `Task.edges`.
        absolute: rank by size of effect; False ranks edges that help most first.
        n_random: random circuits of the same size to compare with.
    """
    ranking, measuring = task.halves()
    edges = ranking.edges(by=by, metric=metric, steps=steps, exact=exact, progress=progress)
    curve, size = None, max(1, int((share or 0) * edges.n_edges))
    if share is None:
        curve = ranking.curve(edges, absolute=absolute, n_random=1, progress=progress)
        size = curve.smallest(FAITHFUL) or curve.n_possible
    circuit = measuring.circuit(
        edges.top(size, absolute=absolute),
        by=by,
        metric=metric,
        members=False,
        n_random=n_random,
        progress=progress,
    )
    return FoundCircuit(edges, curve, circuit)
