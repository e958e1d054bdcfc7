"""How well a model does a task."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from mechlens.results.base import Result
from mechlens.results.columns import Column

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TaskPerformance(Result):
    """The answers of a model to the prompts of a task and to their counterfactuals."""

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
    """Log of the probability of all right answers together, in nats."""
    wrong_log_prob: Float[Tensor, " prompt"]
    corrupted_answer_log_prob: Float[Tensor, " prompt"]
    """The same after the corrupted prompt."""
    corrupted_wrong_log_prob: Float[Tensor, " prompt"]
    rank: Float[Tensor, " prompt"]
    """Of the likeliest right answer among all tokens; 1 is the most likely."""
    right: Bool[Tensor, " prompt"]
    """Whether the likeliest of all right and wrong answers is a right one."""
    estimates: dict[str, tuple[float, float, float]]
    """Mean over prompts, with the bootstrap interval: `accuracy` (of `right`), `top1` (a right answer is the
    top-1 prediction), `logit_diff` (nats), `probability_diff` and `corrupted_logit_diff`."""
    chance: float
    """Accuracy of a guess among right and wrong answers."""
    confidence: float
    seed: int | None

    columns: ClassVar[tuple[Column, ...]] = (
        Column("clean", "prompt"),
        Column("answer"),
        Column("logit_diff", "logit difference", signed=True, help="Log of P(right) / P(wrong)."),
        Column("corrupted_logit_diff", "corrupted", signed=True, help="The same after the corrupted prompt."),
        Column("rank", digits=0, help="Rank of the likeliest right answer; 1 is the most likely token."),
    )

    @property
    def title(self) -> str:
        return f"The task {self.task} in {self.model.name}"

    @property
    def logit_diff(self) -> Float[Tensor, " prompt"]:
        """Log of the ratio of both probabilities: the difference of the logits where each is one token."""
        return self.answer_log_prob - self.wrong_log_prob

    @property
    def corrupted_logit_diff(self) -> Float[Tensor, " prompt"]:
        """The same after the corrupted prompts."""
        return self.corrupted_answer_log_prob - self.corrupted_wrong_log_prob

    @property
    def able(self) -> bool:
        """Whether the model does the task: the interval of its accuracy is above chance."""
        return self.estimates["accuracy"][1] > self.chance

    @property
    def note(self) -> str:
        """What later results say of a task that the model cannot do; empty where it can."""
        if self.able:
            return ""
        mean, low, high = self.estimates["accuracy"]
        return (
            f"the model does not do the task {self.task}: accuracy {mean:.2f} ({low:.2f} to {high:.2f}), "
            f"chance {self.chance:.2f}"
        )

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
