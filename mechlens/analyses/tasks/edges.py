"""What each edge does for a task, to first order and exactly, and how few of them do it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mechlens.analyses.tasks.sets import ChosenSet, TaskRuns
from mechlens.arguments import (
    check_between,
    check_counts,
    check_reals,
    check_type,
    generator_of,
    whole_number,
)
from mechlens.errors import ArgumentError
from mechlens.models.run.edge_gradients import edge_effects
from mechlens.models.run.graph import Graph
from mechlens.progress import progress_bar
from mechlens.results.patching import standard_error
from mechlens.results.task_circuits import ELSEWHERE, CircuitCurve, EdgeEffects

if TYPE_CHECKING:
    from mechlens.analyses.tasks.task import Task

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The shares of edges at which MIB measures faithfulness."""


def estimate_edges(
    task: Task, by: str, metric: str, *, steps: int, exact: int | None, seed: int, progress: bool | None
) -> EdgeEffects:
    """`Task.edges`."""
    check_counts(steps=steps)
    generator = generator_of(seed)
    runs = TaskRuns.of(task, by, metric, edges=True)
    graph = runs.graph
    n_edges = int(graph.possible.sum())
    wanted = n_edges if exact is None else whole_number("exact", exact, least=0)
    n_prompts, roles = len(task.prompts), task.shared_roles
    effects = torch.full((n_prompts, *graph.possible.shape), torch.nan, dtype=torch.float32)
    at_roles = torch.full((n_prompts, len(graph.senders), len(roles) + 1), torch.nan, dtype=torch.float32)
    pairs = list(zip(task.groups, runs.runs, runs.answers, strict=True))
    for group, run, answers in progress_bar(pairs, desc="lengths", progress=progress):
        found = edge_effects(task.model, group.tokens, run.there, answers, steps=steps)
        effects[list(group.index)] = found.edges
        for at, positions in zip(group.index, found.positions, strict=True):
            places = [task.encoded[at].roles[role] for role in roles]
            elsewhere = torch.ones(positions.shape[1], dtype=torch.bool)
            elsewhere[places] = False
            rest = positions[:, elsewhere].sum(1, keepdim=True)
            at_roles[at] = torch.cat([positions[:, places], rest], 1)
    mean = effects.nanmean(0)
    edges = _sampled(mean, min(wanted, n_edges), generator)
    single = [ChosenSet(graph, (edge,), True).mask() for edge in graph.edge_names(edges)]
    nothing = torch.zeros_like(graph.possible)
    full, empty, *rest = runs.values([nothing, graph.possible, *single], desc="edges", progress=progress)
    exact_effects = torch.stack([each - full for each in rest]).mean(1) if rest else mean.new_empty(0)
    return EdgeEffects(
        **runs.fields(full, empty),
        seed=seed,
        steps=steps,
        senders=graph.senders,
        receivers=graph.receivers,
        effect=mean,
        standard_error=standard_error(effects),
        node_standard_error=standard_error(effects.nansum(2)),
        roles=(*roles, ELSEWHERE),
        node_roles=at_roles.nanmean(0),
        exact_edges=graph.edge_names(edges),
        exact=exact_effects.float(),
    )


def _sampled(effect: Tensor, n: int, generator: torch.Generator) -> Bool[Tensor, "sender receiver"]:
    """Edges with the largest estimates, as many as half of `n`, and others at random."""
    order = effect.abs().nan_to_num(-1).flatten().sort(descending=True, stable=True).indices
    order = order[: int((~effect.isnan()).sum())]
    largest = order[: n // 2]
    others = order[n // 2 :]
    others = others[torch.randperm(len(others), generator=generator)[: n - len(largest)]]
    found = torch.zeros(effect.numel(), dtype=torch.bool)
    found[torch.cat([largest, others])] = True
    return found.view(effect.shape)


def faithfulness_curve(
    task: Task,
    effects: EdgeEffects,
    *,
    shares: Sequence[float],
    of_edges: bool,
    absolute: bool,
    n_random: int,
    seed: int,
    progress: bool | None,
) -> CircuitCurve:
    """`Task.curve`."""
    check_type("effects", effects, EdgeEffects)
    whole_number("n_random", n_random, least=0)
    graph = Graph.of(task.model)
    if (effects.senders, effects.receivers) != (graph.senders, graph.receivers):
        raise ArgumentError("effects", "of the same model", effects.model.name)
    n_possible = effects.n_edges if of_edges else len(graph.senders) - 1
    sizes = _sizes(shares, n_possible)
    runs = TaskRuns.of(task, effects.by, effects.metric, edges=of_edges)
    ranked = (effects.top if of_edges else effects.top_nodes)(n_possible, absolute=absolute)
    generator = generator_of(seed)
    orders = [ranked]
    for _ in range(n_random):
        orders.append(tuple(ranked[at] for at in torch.randperm(n_possible, generator=generator).tolist()))
    exactly = of_edges and len(effects.exact_edges) == n_possible
    if exactly:
        orders.append(effects.top_exact(n_possible, absolute=absolute))
    kept = [ChosenSet(graph, order[:size], of_edges).all_but() for order in orders for size in sizes]
    nothing = torch.zeros_like(graph.possible)
    empty = ChosenSet.everything(graph, of_edges=of_edges).mask()
    full, empty, *values = runs.values([nothing, empty, *kept], desc="sets", progress=progress)
    every = torch.stack(values).unflatten(0, (len(orders), len(sizes)))
    return CircuitCurve(
        **runs.fields(full, empty),
        seed=seed,
        ranking=f"{effects.method}, {'by size of effect' if absolute else 'those that help most first'}",
        of_edges=of_edges,
        sizes=sizes,
        n_possible=n_possible,
        values=every[0],
        random=every[1 : 1 + n_random],
        exact=every[-1] if exactly else full.new_empty(0, len(full)),
    )


def _sizes(shares: Sequence[float], n: int) -> tuple[int, ...]:
    for share in shares:
        check_between("each share", share, 0, 1)
    if not shares:
        raise ArgumentError("shares", "at least one number between 0 and 1", shares)
    return tuple(sorted({max(1, int(share * n)) for share in shares}))


def prune_edges(
    task: Task, threshold: float, *, edges: Any, by: str, metric: str, progress: bool | None
) -> tuple[str, ...]:
    """`Task.prune`."""
    check_reals(threshold=threshold)
    if threshold <= 0:
        raise ArgumentError("threshold", "above 0", threshold)
    graph = Graph.of(task.model)
    kept = graph.possible.clone() if edges is None else graph.edges(edges)
    runs = TaskRuns.of(task, by, metric, edges=True)

    def value(some: Tensor) -> float:
        return float(runs.values([graph.possible & ~some]).mean())

    current = value(kept)
    order = kept.nonzero().tolist()
    # the last inputs first, and of each input the last senders
    order.sort(key=lambda edge: (-edge[1], -edge[0]))
    for u, r in progress_bar(order, desc="edges", unit="edge", progress=progress):
        kept[u, r] = False
        readers = graph.readers_of(r)
        if readers and not kept[readers].any():
            continue  # nothing of what it makes is read
        without = value(kept)
        if abs(without - current) < threshold:
            current = without
        else:
            kept[u, r] = True
    return graph.edge_names(kept)
