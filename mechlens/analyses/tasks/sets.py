"""A task's metric with any sets of components or edges replaced, one run per set and prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.analyses.tasks.answers import Answers
from mechlens.analyses.tasks.replaced import replacements
from mechlens.arguments import check_counts, generator_of
from mechlens.errors import ArgumentError
from mechlens.models.protocol import describe
from mechlens.models.run.edge_runs import EdgeRuns, check_edges
from mechlens.models.run.graph import Graph, has_edges
from mechlens.models.run.properties import check_rows_alike
from mechlens.models.run.unembedding import check_streamed
from mechlens.progress import progress_bar
from mechlens.results.task_circuits import ComponentSet, TaskCircuit

if TYPE_CHECKING:
    from mechlens.analyses.tasks.task import Task


@dataclasses.dataclass(frozen=True, eq=False)
class TaskRuns:
    """The metric of a task in runs with replaced edges."""

    task: Task
    graph: Graph
    by: str
    metric: str
    runs: Sequence[EdgeRuns]
    """By group of prompts."""
    answers: Sequence[Answers]

    @classmethod
    def of(cls, task: Task, by: str, metric: str, *, edges: bool) -> TaskRuns:
        """Check the model, and run the corrupted prompts.

        Args:
            edges: whether single edges will be replaced, which not every model allows.
        """
        answers = [
            Answers.of(task.model, [task.encoded[at] for at in group.index], metric) for group in task.groups
        ]
        longest = task.groups[-1].tokens
        check_streamed(task.model, longest)
        if edges:
            check_edges(task.model, longest)
        else:
            for group in task.groups:
                check_rows_alike(task.model, group.tokens)
        there = replacements(task, by)
        runs = [
            EdgeRuns.of(task.model, group.tokens, each)
            for group, each in zip(task.groups, there, strict=True)
        ]
        return cls(task, Graph.of(task.model), by, metric, runs, answers)

    def values(
        self,
        removed: Sequence[Bool[Tensor, "sender receiver"]],
        *,
        desc: str = "sets",
        progress: bool | None = False,
    ) -> Float[Tensor, "set prompt"]:
        """The metric of each set of replaced edges on each prompt."""
        found = torch.full((len(removed), len(self.task.prompts)), torch.nan, dtype=torch.float32)
        for at, each in enumerate(progress_bar(removed, desc=desc, progress=progress)):
            for group, runs, answers in zip(self.task.groups, self.runs, self.answers, strict=True):
                final = runs.final(each[None])[0]
                with torch.no_grad():
                    found[at, list(group.index)] = answers(final, slice(None)).cpu()
        return found

    def fields(self, full: Float[Tensor, " prompt"], empty: Float[Tensor, " prompt"]) -> dict[str, Any]:
        """What every result about the task's circuits carries, but the seed."""
        return {
            "model": describe(self.task.model),
            "task": self.task.name,
            "counterfactual": self.task.counterfactual,
            "prompts": tuple(prompt.clean for prompt in self.task.prompts),
            "by": self.by,
            "metric": self.metric,
            "full": full,
            "empty": empty,
            "note": self.task.note,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class ChosenSet:
    """A set of components, or of edges, of a graph."""

    graph: Graph
    names: tuple[str, ...]
    of_edges: bool

    @classmethod
    def of(cls, graph: Graph, given: Any) -> ChosenSet:
        """Raises ValueError: what the graph does not have, or components beside edges."""
        given = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, tuple)) else given
        of_edges = has_edges(given)
        if of_edges and not all(has_edges(each) for each in ([given] if isinstance(given, str) else given)):
            raise ArgumentError(
                "components", "all edges or all heads, MLPs and layers", given, "embed->L0H1.q is an edge"
            )
        names = graph.edge_names(graph.edges(given)) if of_edges else graph.components(given)
        return cls(graph, names, of_edges)

    @classmethod
    def everything(cls, graph: Graph, *, of_edges: bool) -> ChosenSet:
        return cls(graph, graph.edge_names(graph.possible) if of_edges else graph.senders[1:], of_edges)

    @property
    def n_possible(self) -> int:
        """How many components or edges the model has."""
        return int(self.graph.possible.sum()) if self.of_edges else len(self.graph.senders) - 1

    def without(self, name: str) -> ChosenSet:
        return dataclasses.replace(self, names=tuple(each for each in self.names if each != name))

    def mask(self) -> Bool[Tensor, "sender receiver"]:
        """Its edges; those that leave its components."""
        if not self.of_edges:
            senders = torch.tensor([each in set(self.names) for each in self.graph.senders])
            return self.graph.possible & senders[:, None]
        rows = {name: at for at, name in enumerate(self.graph.senders)}
        columns = {name: at for at, name in enumerate(self.graph.receivers)}
        found = torch.zeros_like(self.graph.possible)
        for edge in self.names:
            sender, _, receiver = edge.partition("->")
            found[rows[sender], columns[receiver]] = True
        return found

    def all_but(self) -> Bool[Tensor, "sender receiver"]:
        """Every other edge of the model; of components, those that leave every other head and MLP."""
        others = self.graph.possible & ~self.mask()
        if not self.of_edges:
            others[0] = False
        return others

    def random(self, generator: torch.Generator) -> ChosenSet:
        """As many components of the same layers, or as many edges into the same layers."""
        own = self.mask()
        graph = self.graph
        if not self.of_edges:
            names: list[str] = []
            for layer in range(graph.n_layers):
                these = graph.layer(layer)
                wanted = sum(name in self.names for name in these)
                names += [
                    these[at] for at in torch.randperm(len(these), generator=generator)[:wanted].tolist()
                ]
            return dataclasses.replace(self, names=tuple(names))
        found = torch.zeros_like(own)
        layers = [graph.receivers_of(layer) for layer in range(graph.n_layers)]
        for inputs in (*layers, slice(len(graph.receivers) - 1, None)):
            there = graph.possible[:, inputs].nonzero()
            wanted = int(own[:, inputs].sum())
            drawn = there[torch.randperm(len(there), generator=generator)[:wanted]]
            found[drawn[:, 0], inputs.start + drawn[:, 1]] = True
        return dataclasses.replace(self, names=graph.edge_names(found))


def run_set(task: Task, components: Any, by: str, metric: str, *, kept: bool) -> ComponentSet:
    """`Task.keep` and `Task.knock_out`."""
    chosen = ChosenSet.of(Graph.of(task.model), components)
    runs = TaskRuns.of(task, by, metric, edges=chosen.of_edges)
    nothing = torch.zeros_like(chosen.mask())
    everything = ChosenSet.everything(chosen.graph, of_edges=chosen.of_edges)
    removed = chosen.all_but() if kept else chosen.mask()
    values, full, empty = runs.values([removed, nothing, everything.mask()])
    return ComponentSet(
        **runs.fields(full, empty), seed=None, components=chosen.names, kept=kept, values=values
    )


def measure_circuit(
    task: Task,
    components: Any,
    by: str,
    metric: str,
    *,
    members: bool,
    n_random: int,
    seed: int,
    progress: bool | None,
) -> TaskCircuit:
    """`Task.circuit`."""
    check_counts(n_random=n_random)
    chosen = ChosenSet.of(Graph.of(task.model), components)
    runs = TaskRuns.of(task, by, metric, edges=chosen.of_edges)
    generator = generator_of(seed)
    random = [chosen.random(generator) for _ in range(n_random)]
    smaller = [chosen.without(name) for name in chosen.names] if members else []
    sets = [
        torch.zeros_like(chosen.mask()),
        ChosenSet.everything(chosen.graph, of_edges=chosen.of_edges).mask(),
        chosen.all_but(),
        chosen.mask(),
        *(each.all_but() for each in (*smaller, *random)),
        *(each.mask() for each in random),
    ]
    values = runs.values(sets, desc="sets", progress=progress)
    full, empty, kept, rest = values[:4]
    without, random_kept, random_rest = values[4:].split([len(smaller), n_random, n_random])
    return TaskCircuit(
        **runs.fields(full, empty),
        seed=seed,
        components=chosen.names,
        n_possible=chosen.n_possible,
        kept=kept,
        rest=rest,
        without=without,
        random_kept=random_kept,
        random_rest=random_rest,
    )
