"""Which components and edges carry a task, and how much of it a set of them does."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.measures.statistics import rank_correlation, ratio_of_means
from mechlens.results.base import Result
from mechlens.results.columns import Column
from mechlens.results.many_effects import ManyEffects
from mechlens.text.display import count, number

if TYPE_CHECKING:
    import pandas as pd

FAITHFULNESS = (
    "(M(circuit) - M(nothing)) / (M(model) - M(nothing)), where M is the mean metric over prompts: 0 is no "
    "better than nothing, 1 is the whole model"
)
EMBED, LOGITS = "embed", "logits"
"""The first sender and the last receiver of a model's graph."""
ELSEWHERE = "elsewhere"
"""All positions that have no role."""
METRIC_WORDS = {"logit_diff": "logit difference", "probability_diff": "probability difference"}
SOURCES = {
    "resample": "its value on the corrupted prompt",
    "mean": "its mean over the corrupted prompts",
    "zero": "zero",
}
"""What a component or an edge carries when it is not kept."""


def set_size(components: tuple[str, ...]) -> str:
    """The number of components, or of edges if they are edges."""
    return count(len(components), "edge" if any("->" in each for each in components) else "component")


def component_of(receiver: str) -> str:
    """The component that has an input: `L5H5` of `L5H5.k`; an MLP and the logits have one."""
    return receiver if receiver.endswith(".mlp") else receiver.partition(".")[0]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _OfTask(Result):
    """What results about a task's circuits share."""

    task: str
    counterfactual: str
    """How the corrupted prompts differ."""
    prompts: tuple[str, ...]
    """The clean prompts as text."""
    by: str
    """What replaces the rest: `resample`, `mean` or `zero`."""
    metric: str
    """`logit_diff` (nats) or `probability_diff`."""
    full: Float[Tensor, " prompt"]
    """The metric of the whole model."""
    empty: Float[Tensor, " prompt"]
    """The metric with everything replaced."""
    seed: int | None
    """Of the random sets, or of the edges that were drawn to be measured exactly; None if none are."""
    note: str
    """That the model does not do the task; empty where it does."""

    def described(self) -> str:
        """The task, the metric and what replaces the rest, in a few sentences."""
        full, empty = (number(float(each.mean())) for each in (self.full, self.empty))
        return (
            f"Task {self.task}, {count(len(self.prompts), 'prompt')}. The mean {METRIC_WORDS[self.metric]} "
            f"is {full} in the whole model and {empty} with everything replaced. What is replaced carries "
            f"{SOURCES[self.by]}."
        )

    def share(self, values: Float[Tensor, " prompt"]) -> tuple[float, float, float]:
        """Faithfulness of runs with this metric, and its 95% bootstrap interval over prompts."""
        return ratio_of_means(values - self.empty, self.full - self.empty)

    def shares(self, values: Float[Tensor, "*set prompt"]) -> Float[Tensor, "*set"]:
        """The same without intervals, for several sets."""
        return (values - self.empty).mean(-1) / (self.full - self.empty).mean()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ComponentSet(_OfTask):
    """Runs in which a set of components or edges is kept, or knocked out."""

    components: tuple[str, ...]
    """The set: heads, MLPs or edges."""
    kept: bool
    """Whether everything else was replaced (`Task.keep`), or the set itself (`Task.knock_out`)."""
    values: Float[Tensor, " prompt"]
    """The metric of these runs."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("prompt"),
        Column("value", "metric", signed=True),
        Column("full", "whole model", signed=True),
        Column("empty", "everything replaced", signed=True),
    )

    @property
    def title(self) -> str:
        return f"{self.size} {'kept' if self.kept else 'knocked out'}, task {self.task} in {self.model.name}"

    @property
    def size(self) -> str:
        """The number of components or edges."""
        return set_size(self.components)

    @property
    def faithfulness(self) -> tuple[float, float, float]:
        """The share of the task that is left, with its 95% interval."""
        return self.share(self.values)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt: prompt, value, full, empty."""
        import pandas as pd

        values = {"value": self.values, "full": self.full, "empty": self.empty}
        return pd.DataFrame({"prompt": self.prompts} | {k: v.numpy() for k, v in values.items()})


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TaskCircuit(_OfTask):
    """How much of a task a circuit does: faithfulness, completeness and minimality, beside random sets."""

    components: tuple[str, ...]
    """The circuit: heads and MLPs, or edges."""
    n_possible: int
    """How many components or edges the model has."""
    kept: Float[Tensor, " prompt"]
    """The metric of the circuit alone."""
    rest: Float[Tensor, " prompt"]
    """The metric of the model without the circuit."""
    without: Float[Tensor, "member prompt"]
    """The metric of the circuit less each of its members; empty where that was not asked for."""
    random_kept: Float[Tensor, "draw prompt"]
    """`kept` of random sets of the same size in the same layers."""
    random_rest: Float[Tensor, "draw prompt"]
    """`rest` of the same random sets."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("component"),
        Column("adds", signed=True, help="Faithfulness of the circuit less that without this member."),
        Column("low", "at least", signed=True, help="95% bootstrap interval over prompts."),
        Column("high", "at most", signed=True),
    )

    @property
    def title(self) -> str:
        return f"Circuit of {self.size}, task {self.task} in {self.model.name}"

    @property
    def size(self) -> str:
        """The number of components or edges."""
        return set_size(self.components)

    @property
    def faithfulness(self) -> tuple[float, float, float]:
        """The share of the task that the circuit alone does, with its 95% interval over prompts."""
        return self.share(self.kept)

    @property
    def left(self) -> tuple[float, float, float]:
        """The share that the rest of the model still does: near 0 for a complete circuit."""
        return self.share(self.rest)

    @property
    def random_faithfulness(self) -> Float[Tensor, " draw"]:
        return self.shares(self.random_kept)

    @property
    def random_left(self) -> Float[Tensor, " draw"]:
        return self.shares(self.random_rest)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per member: component, adds, low, high; nan if members were not measured."""
        import pandas as pd

        rows = []
        for at, name in enumerate(self.components):
            adds = (torch.nan,) * 3
            if len(self.without):
                adds = ratio_of_means(self.kept - self.without[at], self.full - self.empty)
            rows.append((name, *adds))
        return pd.DataFrame(rows, columns=["component", "adds", "low", "high"])

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The members that add most."""
        return self.to_dataframe().sort_values("adds", ascending=False, kind="stable").head(top)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class EdgeEffects(ManyEffects, _OfTask):
    """The estimated effect of replacing each edge alone, with the exact effect of some."""

    steps: int
    """Gradients that were averaged: 1 is edge attribution patching, more are integrated gradients."""
    senders: tuple[str, ...]
    """`embed`, heads and MLPs."""
    receivers: tuple[str, ...]
    """The inputs: `L5H5.k`, `L5.mlp`, `logits`."""
    effect: Float[Tensor, "sender receiver"]
    """Metric with the edge replaced less that of the whole model, a mean over prompts: negative where the
    edge helps. nan for pairs that are no edges."""
    standard_error: Float[Tensor, "sender receiver"]
    """Of `effect`, over prompts."""
    node_standard_error: Float[Tensor, " sender"]
    """Of `nodes`, over prompts."""
    roles: tuple[str, ...]
    """The roles of the task, in the order of the first prompt; last `elsewhere`, all other positions."""
    node_roles: Float[Tensor, "sender role"]
    """The estimated effect of replacing a component at the positions of one role; they sum to `nodes` unless
    two roles share a position."""
    exact_edges: tuple[str, ...]
    """The edges that were replaced in runs of their own: half of them those with the largest estimates, half
    drawn from all others."""
    exact: Float[Tensor, " edge"]
    """Their exact effects."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("edge"),
        Column(
            "effect",
            signed=True,
            help="Estimated metric with this edge replaced in the clean run, less that of the clean run: "
            "negative where the edge helps.",
        ),
        Column("standard_error", "", help="Of the effect, over prompts."),
        Column("exact", signed=True, help="The same from a run with this edge replaced."),
    )

    @property
    def title(self) -> str:
        return f"Edges of the task {self.task} in {self.model.name}"

    @property
    def method(self) -> str:
        """The method in words."""
        if self.steps == 1:
            return "edge attribution patching"
        return f"edge attribution patching with integrated gradients ({self.steps} steps)"

    @property
    def n_prompts(self) -> int:
        return len(self.prompts)

    @property
    def n_edges(self) -> int:
        return int((~self.effect.isnan()).sum())

    @property
    def nodes(self) -> Float[Tensor, " sender"]:
        """The estimated effect of replacing a whole component: the sum over the edges that leave it."""
        return self.effect.nansum(1)

    @property
    def correlation(self) -> float:
        """Spearman's correlation of estimated and exact effects over `exact_edges`; nan without them."""
        if len(self.exact_edges) < 2:
            return float("nan")
        return float(rank_correlation(self._estimates(self.exact_edges), self.exact))

    def top(self, k: int, *, absolute: bool = False) -> tuple[str, ...]:
        """The `k` most important edges, the most important first.

        Args:
            k: how many; at most `n_edges`.
            absolute: rank by the size of the effect. False ranks edges that help first and edges that hurt
                last.
        """
        flat = self.effect.flatten()
        score = (flat.abs() if absolute else -flat).nan_to_num(-torch.inf)
        order = score.sort(descending=True, stable=True).indices[: min(k, self.n_edges)].tolist()
        width = len(self.receivers)
        return tuple(f"{self.senders[at // width]}->{self.receivers[at % width]}" for at in order)

    def top_exact(self, k: int, *, absolute: bool = False) -> tuple[str, ...]:
        """As `top`, by the exact effects of the edges that have one."""
        score = self.exact.abs() if absolute else -self.exact
        return tuple(self.exact_edges[at] for at in score.sort(descending=True, stable=True).indices[:k])

    def top_nodes(self, k: int, *, absolute: bool = False) -> tuple[str, ...]:
        """The `k` most important heads and MLPs, the most important first; as `top`."""
        nodes = self.nodes[1:]
        order = (nodes.abs() if absolute else -nodes).sort(descending=True, stable=True).indices[:k].tolist()
        return tuple(self.senders[1 + at] for at in order)

    def to_dot(self, k: int = 40, *, absolute: bool = True) -> str:
        """The `k` most important edges as a graph in the DOT language of Graphviz.

        A line is as wide as the effect is large, and dashed where the edge hurts. `to_json()` has all edges.

        Args:
            k, absolute: as in `top`.
        """
        table = self.to_dataframe().set_index("edge").loc[list(self.top(k, absolute=absolute))]
        largest = float(table["effect"].abs().max()) or 1.0
        lines = []
        for row in table.to_dict("records"):
            end = component_of(row["receiver"])
            read = row["receiver"].removeprefix(end).strip(".")
            label = f"{read} {row['effect']:+.3f}".strip()
            look = f'penwidth={0.5 + 4 * abs(row["effect"]) / largest:.2f}, label="{label}"'
            dashed = ", style=dashed" if row["effect"] > 0 else ""
            lines.append(f'  "{row["sender"]}" -> "{end}" [{look}{dashed}];')
        return "\n".join([f'digraph "{self.task}" {{', "  rankdir=BT;", *lines, "}"]) + "\n"

    def role_of(self, component: str) -> str:
        """The role at whose positions a component has its largest effect."""
        return self.roles[int(self.node_roles[self.senders.index(component)].abs().argmax())]

    def _estimates(self, edges: tuple[str, ...]) -> Float[Tensor, " edge"]:
        places = [edge.split("->") for edge in edges]
        return torch.stack([self.effect[self.senders.index(u), self.receivers.index(r)] for u, r in places])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per edge: edge, sender, receiver, effect, standard_error, exact."""
        import pandas as pd

        places = (~self.effect.isnan()).nonzero().tolist()
        exact = dict(zip(self.exact_edges, self.exact.tolist(), strict=True))
        names = [(self.senders[u], self.receivers[r]) for u, r in places]
        edges = [f"{u}->{r}" for u, r in names]
        there = ~self.effect.isnan()
        return pd.DataFrame(
            {
                "edge": edges,
                "sender": [u for u, _ in names],
                "receiver": [r for _, r in names],
                "effect": self.effect[there].numpy(),
                "standard_error": self.standard_error[there].numpy(),
                "exact": [exact.get(edge, float("nan")) for edge in edges],
            }
        )

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The edges with the largest effects, either way."""
        table = self.to_dataframe().sort_values("effect", key=abs, ascending=False, kind="stable").head(top)
        names = [each.name for each in self.columns if each.name != "exact" or len(self.exact_edges)]
        return table[names]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class CircuitCurve(_OfTask):
    """Faithfulness of the most important components or edges, by how many are kept."""

    ranking: str
    """What ranks them, in words."""
    of_edges: bool
    """Edges, or heads and MLPs."""
    sizes: tuple[int, ...]
    """How many are kept at each point."""
    n_possible: int
    """How many there are."""
    values: Float[Tensor, "size prompt"]
    """The metric at each point."""
    random: Float[Tensor, "draw size prompt"]
    """The same for random rankings."""
    exact: Float[Tensor, "some prompt"]
    """The same for the ranking by exact effects; empty if they are not known for all edges."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("kept", digits=0),
        Column("share", digits=4, help="Of all edges or components."),
        Column("faithfulness", help=f"{FAITHFULNESS}."),
        Column("low", "at least", help="95% bootstrap interval over prompts."),
        Column("high", "at most"),
        Column("exact", "by exact effects", help="Faithfulness of the edges with the largest exact effects."),
        Column("random", "random sets", help="Mean faithfulness of random sets of the same size."),
    )

    @property
    def title(self) -> str:
        return f"Faithfulness by size, task {self.task} in {self.model.name}"

    @property
    def at(self) -> tuple[float, ...]:
        """The shares of all edges or components."""
        return tuple(size / self.n_possible for size in self.sizes)

    @property
    def faithfulness(self) -> Float[Tensor, " size"]:
        return self.shares(self.values)

    @property
    def random_faithfulness(self) -> Float[Tensor, "draw size"]:
        return self.shares(self.random)

    @property
    def exact_faithfulness(self) -> Float[Tensor, " some"]:
        """Of the ranking by exact effects; empty without it."""
        return self.shares(self.exact)

    def areas(self, faithfulness: Float[Tensor, " size"]) -> tuple[float, float]:
        """CPR, the area under a curve, and CMD, the area between it and 1, over the shares that were kept.

        References: Mueller et al. 2025, "MIB: A Mechanistic Interpretability Benchmark", arXiv:2504.13151.
        """
        x = torch.tensor(self.at, dtype=torch.double)
        y = faithfulness.double()
        return float(torch.trapezoid(y, x)), float(torch.trapezoid((1 - y).abs(), x))

    @property
    def cpr(self) -> float:
        return self.areas(self.faithfulness)[0]

    @property
    def cmd(self) -> float:
        return self.areas(self.faithfulness)[1]

    def smallest(self, faithfulness: float) -> int | None:
        """The fewest edges or components of the curve that are this faithful; None if none are."""
        enough = [
            size for size, f in zip(self.sizes, self.faithfulness.tolist(), strict=True) if f >= faithfulness
        ]
        return min(enough, default=None)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per size: kept, share, faithfulness, low, high, exact, random."""
        import pandas as pd

        rows = []
        for at, size in enumerate(self.sizes):
            random = self.random_faithfulness[:, at].mean() if len(self.random) else torch.nan
            exact = self.exact_faithfulness[at] if len(self.exact) else torch.nan
            rows.append((size, self.at[at], *self.share(self.values[at]), float(exact), float(random)))
        return pd.DataFrame(rows, columns=[each.name for each in self.columns])

    def summary(self, top: int = 10) -> pd.DataFrame:
        """All points, with the columns that are known."""
        return self.to_dataframe().dropna(axis="columns", how="all")
