"""The study `ioi`: the circuit of the indirect object, found on half of the prompts, measured on the others.

References: Wang et al. 2022, arXiv:2211.00593. In GPT-2 small their circuit of 26 heads is measured as they
do it: the other heads are replaced by their mean over prompts with other names, and all MLPs stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from mechlens.analyses.attribution import direct_logit_attribution
from mechlens.analyses.circuits.copying import copy_scores
from mechlens.analyses.heads.scores import score_heads
from mechlens.analyses.tasks import Task, load_task
from mechlens.analyses.tasks.search import find_circuit
from mechlens.models.protocol import LensModel, describe
from mechlens.results import (
    CircuitCurve,
    ComponentSet,
    CopyScores,
    EdgeEffects,
    LogitAttribution,
    TaskCircuit,
    TaskHeads,
    TaskPerformance,
)
from mechlens.show.section import Section, section
from mechlens.studies.claims import Measured, Study
from mechlens.studies.published import IOI_GPT2, figures_of
from mechlens.text.task_prompts import TaskPrompt

HEADS = (
    *("L9H9", "L10H0", "L9H6"),  # name movers
    *("L10H10", "L10H6", "L10H2", "L10H1", "L11H2", "L9H7", "L9H0", "L11H9"),  # their backups
    *("L10H7", "L11H10"),  # negative name movers
    *("L7H3", "L7H9", "L8H6", "L8H10"),  # S-inhibition
    *("L5H5", "L5H8", "L5H9", "L6H9"),  # induction
    *("L0H1", "L0H10", "L3H0"),  # duplicate tokens
    *("L2H2", "L4H11"),  # previous token
)
"""The circuit of Wang et al. in GPT-2 small."""
COPYING, NEGATIVE = ("L9H9", "L10H0", "L9H6"), ("L10H7", "L11H10")
"""Their name movers and negative name movers."""
PROMPT = "When John and Mary went to the shops, John gave the bag to"
DEMO = (
    ("When{a} and{b} went to the shops,{s} gave the bag to", " John", " Mary"),
    ("When{a} and{b} went to the park,{s} gave the ball to", " Tom", " James"),
    ("When{a} and{b} went to the shops,{s} gave an apple to", " Dan", " Sid"),
    ("After{a} and{b} went to the park,{s} gave a drink to", " Martin", " Amy"),
)
"""The templates and names of TransformerLens's demonstration; either name is the subject once."""
COMPARED = 20
"""How many components of both halves are compared."""


@dataclasses.dataclass(frozen=True)
class IoiStudy(Study):
    """The task, the circuit that was found, and in GPT-2 small the published one."""

    ioi: TaskPerformance
    ioi_edges: EdgeEffects
    """Of the first half of the prompts, which rank them."""
    ioi_edges_of_others: EdgeEffects
    """Of the second half."""
    ioi_curve: CircuitCurve
    ioi_circuit: TaskCircuit
    """Measured on the second half."""
    ioi_copying: CopyScores
    """Of the names of the task."""
    ioi_heads: TaskHeads
    ioi_published: ComponentSet | None
    """The published circuit, in GPT-2 small."""
    ioi_attribution: LogitAttribution | None
    """Of Mary minus John, in GPT-2 small."""
    ioi_demo: TaskPerformance | None
    """Of the eight prompts of TransformerLens's demonstration, in GPT-2 small."""
    ioi_plain_curve: CircuitCurve | None
    """Of edge attribution patching without integrated gradients, as the MIB benchmark measures it: edges by
    size of effect. In GPT-2 small."""

    @property
    def overlap(self) -> float:
        """The share of the most important components that both halves of the prompts agree on."""
        both = [
            set(each.top_nodes(COMPARED, absolute=True))
            for each in (self.ioi_edges, self.ioi_edges_of_others)
        ]
        return len(both[0] & both[1]) / len(both[0])

    def quantities(self) -> dict[str, Measured]:
        right = self.ioi.right.float()
        measured = {
            "logit_diff": Measured(
                float(self.ioi.logit_diff.mean()),
                "logit of the indirect object minus that of the subject, mean over prompts",
                samples=self.ioi.logit_diff,
            ),
            "right": Measured(
                float(right.mean()),
                "share of prompts in which the indirect object is more likely than the subject",
                0.05,
                among=right,
            ),
            # other prompts give another circuit, whose figures differ by as much as their intervals are wide
            "faithfulness": Measured(
                self.ioi_circuit.faithfulness[0], "faithfulness of the circuit on other prompts", 0.1
            ),
            "left": Measured(self.ioi_circuit.left[0], "share of the task without the circuit", 0.05),
            "overlap": Measured(
                self.overlap, f"share of the {COMPARED} largest components that both halves agree on", 0.15
            ),
        }
        if self.ioi_published is not None:
            alone = self.ioi_published
            measured["heads_alone"] = Measured(
                float(alone.values.mean() / alone.full.mean()),
                "logit difference of the 26 heads alone as a share of the model's",
                0.05,
            )
        if self.ioi_plain_curve is not None:
            measured["cmd"] = Measured(
                self.ioi_plain_curve.cmd, "CMD of edge attribution patching, edges by size of effect", 0.02
            )
        if self.ioi_demo is not None:
            for name, values in (
                ("clean", self.ioi_demo.logit_diff),
                ("corrupted", self.ioi_demo.corrupted_logit_diff),
            ):
                measured[f"demo {name}"] = Measured(
                    float(values.mean()), f"logit difference of eight {name} prompts", 0.002, among=values
                )
        if self.ioi_attribution is not None:
            measured |= self._published_heads(self.ioi_attribution)
        return measured

    def _published_heads(self, attribution: LogitAttribution) -> dict[str, Measured]:
        scores = self.ioi_copying.to_dataframe().set_index("label")
        added = attribution.to_dataframe().query("pos == pos.max()").set_index("component")["contribution"]
        return {
            # shares of the names; theirs are of other names
            "copies": Measured(
                float(scores.loc[[*COPYING], "copies"].mean()), f"copy score of {', '.join(COPYING)}", 0.1
            ),
            "suppresses": Measured(
                float(scores.loc[[*NEGATIVE], "suppresses"].mean()),
                f"negative copy score of {', '.join(NEGATIVE)}",
                0.1,
            ),
            **{
                f"attribution of {label}": Measured(
                    float(added[label]), f"what {label} adds to the logit of Mary minus John", 0.005
                )
                for label in HEADS
            },
        }

    def sections(self) -> list[Section]:
        found = [
            section(self.ioi, top=3),
            section(self.ioi_edges, text="The first half of the prompts ranks the edges."),
            section(self.ioi_curve),
            section(
                self.ioi_circuit,
                text="The second half of the prompts measures the circuit. Of the "
                f"{COMPARED} components with the largest effects, both halves agree on {self.overlap:.0%}.",
            ),
        ]
        found += [section(self.ioi_heads), section(self.ioi_copying)]
        if self.ioi_published is not None:
            found.append(section(self.ioi_published, title="The published circuit of 26 heads"))
        if self.ioi_plain_curve is not None:
            found.append(section(self.ioi_plain_curve, title="Faithfulness by size, as in MIB"))
        if self.ioi_demo is not None:
            found.append(section(self.ioi_demo, title="Eight prompts of TransformerLens's demonstration"))
        if self.ioi_attribution is not None:
            found.append(section(self.ioi_attribution, text=f"{PROMPT} Mary, not John."))
        return found


def study_ioi(model: LensModel, *, n: int = 64, seed: int = 0, progress: bool | None = None) -> IoiStudy:
    """Do the task, find its circuit, and measure it.

    Args:
        n: number of prompts, half of which rank the edges.
        seed: of the prompts.

    Cost: some 55 forward passes of each prompt that ranks, 35 of each that measures, and 5 backward passes of
    either; `copy_scores` and `score_heads`.
    """
    task = load_task("ioi", model, n=n, seed=seed)
    found = find_circuit(task, progress=progress)
    assert found.curve is not None  # no size was given
    published = attribution = demo = plain_curve = None
    if set(IOI_GPT2) <= set(figures_of(describe(model))):
        others = load_task("ioi", model, n=n, seed=seed, counterfactual="other-names")
        mlps = [f"L{layer}.mlp" for layer in range(model.cfg.n_layers)]
        published = others.keep([*HEADS, *mlps], by="mean")
        demo = Task(model, list(_demo_prompts()), name="ioi").performance()
        ranking = task.halves()[0]
        plain_curve = ranking.curve(ranking.edges(), absolute=True, n_random=0, progress=progress)
        attribution = direct_logit_attribution(model, PROMPT, " Mary", against=" John")
    copying = copy_scores(model, task.answer_ids)
    return IoiStudy(
        comparisons=(),
        ioi=task.performance(),
        ioi_edges=found.edges,
        ioi_edges_of_others=task.halves()[1].edges(steps=found.edges.steps, progress=progress),
        ioi_curve=found.curve,
        ioi_circuit=found.circuit,
        ioi_copying=copying,
        ioi_heads=task.heads(found.edges, copying=copying, scores=score_heads(model, progress=progress)),
        ioi_published=published,
        ioi_attribution=attribution,
        ioi_demo=demo,
        ioi_plain_curve=plain_curve,
    )


def _demo_prompts() -> Iterator[TaskPrompt]:
    """Each template with either name as the subject; the corrupted prompt is the other one."""
    for template, a, b in DEMO:
        for subject, given in ((a, b), (b, a)):
            clean, corrupted = (template.format(a=a, b=b, s=name) for name in (subject, given))
            yield TaskPrompt(clean, corrupted, (given,), (subject,))
