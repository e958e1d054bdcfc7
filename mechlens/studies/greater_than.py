"""The study `greater-than`: which circuit finds a later year, and in GPT-2 small the published one.

References: Hanna et al. 2023, arXiv:2305.00586. Their circuit is measured as they do it: every other edge
carries its value after a prompt whose first year ends in 01. They also leave all that the queries of the
attending heads read as it is; here these queries read the embedding, all earlier MLPs and the first heads.
"""

from __future__ import annotations

import dataclasses
from itertools import combinations

from mechlens.analyses.tasks import load_task
from mechlens.analyses.tasks.search import find_circuit
from mechlens.models.protocol import LensModel, describe
from mechlens.results import CircuitCurve, ComponentSet, EdgeEffects, TaskCircuit, TaskPerformance
from mechlens.show.section import Section, section
from mechlens.studies.claims import Measured, Study
from mechlens.studies.published import GREATER_THAN_GPT2, figures_of

FIRST = ("L0H1", "L0H3", "L0H5")
EARLY = tuple(f"L{layer}.mlp" for layer in range(4))
ATTENDING = ("L5H5", "L6H1", "L6H9", "L7H10", "L8H11", "L9H1")
LATE = tuple(f"L{layer}.mlp" for layer in range(8, 12))
"""The circuit of Hanna et al. in GPT-2 small, by its four parts."""


def published_edges() -> list[str]:
    """The edges of the published circuit, with what the attending heads' queries read."""
    found = [f"embed->{name}" for name in FIRST]
    found += [f"{name}->logits" for name in (*ATTENDING, *LATE)]
    found += [f"L0H1->{mlp}" for mlp in EARLY]
    found += [f"{one}->{other}" for one, other in combinations(LATE, 2)]
    mlps = [f"L{layer}.mlp" for layer in range(9)]
    # the early MLPs, and those that write for the queries, read the embedding and each other
    found += [f"embed->{mlp}" for mlp in mlps]
    found += [f"{one}->{other}" for one, other in combinations(mlps, 2)]
    for head in ATTENDING:
        layer = int(head[1])
        found += [f"{name}->{head}.{read}" for name in (*FIRST, *EARLY) for read in "kv"]
        found += [f"{name}->{head}.q" for name in ("embed", *FIRST, *mlps[:layer])]
        found += [f"{head}->{mlp}" for mlp in LATE if int(mlp[1:].partition(".")[0]) >= layer]
    return found


@dataclasses.dataclass(frozen=True)
class GreaterThanStudy(Study):
    """The task, the circuit that was found, and in GPT-2 small the published one."""

    greater_than: TaskPerformance
    greater_than_edges: EdgeEffects
    """Of the first half of the prompts, which rank them."""
    greater_than_curve: CircuitCurve
    greater_than_circuit: TaskCircuit
    """Measured on the second half."""
    greater_than_published: ComponentSet | None
    """The published circuit, in GPT-2 small."""

    def quantities(self) -> dict[str, Measured]:
        performance = self.greater_than
        difference = performance.answer_log_prob.exp() - performance.wrong_log_prob.exp()
        measured = {
            "probability_diff": Measured(
                float(difference.mean()),
                "probability of later years minus that of earlier ones, mean over prompts",
                0.02,
                among=difference,
            ),
            "faithfulness": Measured(
                self.greater_than_circuit.faithfulness[0], "faithfulness of the circuit on other prompts", 0.1
            ),
        }
        if self.greater_than_published is not None:
            alone = self.greater_than_published
            measured["circuit_alone"] = Measured(
                float(alone.values.mean() / alone.full.mean()),
                "probability difference of the published circuit alone as a share of the model's",
                0.02,
            )
        return measured

    def sections(self) -> list[Section]:
        found = [
            section(self.greater_than, top=3),
            section(self.greater_than_edges, text="The first half of the prompts ranks the edges."),
            section(self.greater_than_curve),
            section(self.greater_than_circuit, text="The second half of the prompts measures the circuit."),
        ]
        if self.greater_than_published is not None:
            found.append(section(self.greater_than_published, title="The published circuit"))
        return found


def study_greater_than(
    model: LensModel, *, n: int = 64, seed: int = 0, progress: bool | None = None
) -> GreaterThanStudy:
    """Do the task, find its circuit, and measure it.

    Args:
        n: number of prompts, half of which rank the edges.
        seed: of the prompts.

    Cost: some 50 forward passes and 5 backward passes of each prompt.
    """
    task = load_task("greater-than", model, n=n, seed=seed)
    found = find_circuit(task, metric="probability_diff", progress=progress)
    assert found.curve is not None  # no size was given
    published = None
    if set(GREATER_THAN_GPT2) <= set(figures_of(describe(model))):
        published = task.keep(published_edges(), metric="probability_diff")
    return GreaterThanStudy(
        comparisons=(),
        greater_than=task.performance(),
        greater_than_edges=found.edges,
        greater_than_curve=found.curve,
        greater_than_circuit=found.circuit,
        greater_than_published=published,
    )
