"""How well a model does a task."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.results.base import Result
from mechlens.results.columns import Column
from mechlens.results.heads import head_label
from mechlens.results.many_effects import ManyEffects
from mechlens.results.patching import share_of_way, standard_error

if TYPE_CHECKING:
    import pandas as pd


def inability(task: str, accuracy: tuple[float, float, float], chance: float) -> str:
    """That a model cannot do a task, with its accuracy and interval; empty if it can."""
    mean, low, high = accuracy
    if low != low:
        return f"a single prompt does not show whether the model can do the task {task}"
    if low > chance:
        return ""
    return (
        f"the model cannot do the task {task}: accuracy {mean:.2f} ({low:.2f} to {high:.2f}), "
        f"chance {chance:.2f}"
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TaskPerformance(Result):
    """A model's answers to the prompts of a task and to their counterfactuals."""

    task: str
    """Its name."""
    counterfactual: str
    """How the corrupted prompts differ."""
    clean: tuple[str, ...]
    """The prompts as text."""
    corrupted: tuple[str, ...]
    answers: tuple[str, ...]
    """The right next tokens, with commas between them."""
    wrong: tuple[str, ...]
    answer_log_prob: Float[Tensor, " prompt"]
    """Log of the total probability of the right answers, in nats."""
    wrong_log_prob: Float[Tensor, " prompt"]
    corrupted_answer_log_prob: Float[Tensor, " prompt"]
    """The same after the corrupted prompt."""
    corrupted_wrong_log_prob: Float[Tensor, " prompt"]
    rank: Float[Tensor, " prompt"]
    """Rank of the most likely right answer among all tokens; 1 is the most likely."""
    right: Bool[Tensor, " prompt"]
    """Whether the most likely of all right and wrong answers is a right one."""
    estimates: dict[str, tuple[float, float, float]]
    """Mean over prompts, with the bootstrap interval: `accuracy` (of `right`), `top1` (a right answer is the
    top-1 prediction), `logit_diff` (nats), `probability_diff` and `corrupted_logit_diff`."""
    chance: float
    """Accuracy of a random guess among the right and wrong answers."""
    confidence: float
    seed: int | None

    columns: ClassVar[tuple[Column, ...]] = (
        Column("clean", "prompt"),
        Column("answer"),
        Column("logit_diff", "logit difference", signed=True, help="Log of P(right) / P(wrong)."),
        Column("corrupted_logit_diff", "corrupted", signed=True, help="The same after the corrupted prompt."),
        Column("rank", digits=0, help="Rank of the most likely right answer; 1 is the most likely token."),
    )

    @property
    def title(self) -> str:
        return f"The task {self.task} in {self.model.name}"

    @property
    def logit_diff(self) -> Float[Tensor, " prompt"]:
        """Log of the ratio of the two probabilities: the logit difference if each is one token."""
        return self.answer_log_prob - self.wrong_log_prob

    @property
    def corrupted_logit_diff(self) -> Float[Tensor, " prompt"]:
        """The same after the corrupted prompts."""
        return self.corrupted_answer_log_prob - self.corrupted_wrong_log_prob

    @property
    def able(self) -> bool:
        """Whether the model does the task: the interval of its accuracy is above chance."""
        return not self.note

    @property
    def note(self) -> str:
        """The warning that later results repeat if the model cannot do the task; otherwise empty."""
        return inability(self.task, self.estimates["accuracy"], self.chance)

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The first `top` prompts, on one line each."""
        table = self.to_dataframe()[[each.name for each in self.columns]].head(top)
        return table.assign(clean=table["clean"].str.replace("\n", "⏎"))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt: clean, corrupted, answer, wrong, logit_diff, corrupted_logit_diff, rank."""
        import pandas as pd

        return pd.DataFrame(
            {
                "clean": self.clean,
                "corrupted": self.corrupted,
                "answer": self.answers,
                "wrong": self.wrong,
                "logit_diff": self.logit_diff.numpy(),
                "corrupted_logit_diff": self.corrupted_logit_diff.numpy(),
                "rank": self.rank.numpy(),
            }
        )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RoleGrid(ManyEffects, Result):
    """Patches by layer, head and role, for the prompts of a task."""

    task: str
    counterfactual: str
    prompts: tuple[str, ...]
    """The clean prompts as text."""
    site: str
    source: str
    """Where the values come from, in words."""
    into: str
    """The run that was patched: `clean` or `corrupted`."""
    axes: tuple[str, ...]
    """The axes of the grid, in order: some of `layer`, `head`, `role`. The rest is patched together."""
    layers: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]
    """(layer, head) of the heads that are patched; empty where all are patched together."""
    roles: tuple[str, ...]
    """The roles whose positions are patched; empty where all positions are patched together."""
    values: Float[Tensor, "prompt *grid"]
    """The logit difference of each patched run."""
    clean: Float[Tensor, " prompt"]
    """The logit difference without a patch."""
    corrupted: Float[Tensor, " prompt"]
    """The same on the corrupted prompts."""
    seed: int | None
    note: str
    """That the model cannot do the task; empty if it can."""

    @property
    def columns(self) -> tuple[Column, ...]:  # type: ignore[override]  # the axes differ
        places = [axis for axis in self.axes if axis != "layer" or "head" not in self.axes]
        return (
            *(Column("label", "head") if axis == "head" else Column(axis) for axis in places),
            Column(
                "effect", "change", "logits", signed=True, help="Of the logit difference, mean over prompts."
            ),
            Column("standard_error", "", "logits", help="Of the effect, over prompts."),
            Column("recovered", help="Share of the way to the other run: 0 is none of it, 1 all of it."),
        )

    @property
    def title(self) -> str:
        by = f" by {' and '.join(self.axes)}" if self.axes else ""
        return f"Patches of {self.site}{by}, task {self.task} in {self.model.name}"

    @property
    def n_prompts(self) -> int:
        return len(self.prompts)

    @property
    def place(self) -> str:
        """What is patched, and the roles that are patched together, if they are."""
        together = self.roles and "role" not in self.axes
        return f"{self.site} at {' and '.join(self.roles)}" if together else self.site

    @property
    def changes(self) -> Float[Tensor, "prompt *grid"]:
        """The logit difference of each patched run minus that of the same run without a patch."""
        return self.values - self.base.reshape(-1, *[1] * len(self.axes))

    @property
    def base(self) -> Float[Tensor, " prompt"]:
        """The logit difference of the run that is patched, without the patch."""
        return self.clean if self.into == "clean" else self.corrupted

    @property
    def effect(self) -> Float[Tensor, "*grid"]:
        """Mean change over prompts."""
        return self.changes.mean(0)

    @property
    def standard_error(self) -> Float[Tensor, "*grid"]:
        """Of `effect`, over prompts; nan for a single prompt."""
        return standard_error(self.changes)

    @property
    def recovered(self) -> Float[Tensor, "*grid"]:
        """`effect` as a share of the difference between the two runs; nan if there is none."""
        return share_of_way(self.effect, self.base, self.corrupted if self.into == "clean" else self.clean)

    def labels(self, axis: str) -> tuple[int, ...] | tuple[str, ...]:
        """The layers, head numbers or roles along an axis of the grid."""
        if axis == "head":
            return tuple(sorted({head for _, head in self.heads}))
        return self.layers if axis == "layer" else self.roles

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The cells with the largest effects, either way, with the columns of `columns`."""
        table = self.to_dataframe().sort_values("effect", key=abs, ascending=False, kind="stable")
        return table[[each.name for each in self.columns]].head(top)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: the axes, label (`L5H5`, for heads), effect, standard_error, recovered."""
        import pandas as pd

        cells = list(itertools.product(*map(self.labels, self.axes)))
        table = pd.DataFrame(cells, columns=list(self.axes), index=range(len(cells)))
        if "head" in self.axes:
            table["label"] = [head_label(*place) for place in zip(table["layer"], table["head"], strict=True)]
        for name in ("effect", "standard_error", "recovered"):
            table[name] = getattr(self, name).reshape(-1).numpy()
        return table
