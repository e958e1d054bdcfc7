"""What kinds of heads carry a task."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.results.base import Result
from mechlens.results.columns import Column
from mechlens.results.heads import CLEAR_SCORE, TIMES_NULL, head_label

if TYPE_CHECKING:
    import pandas as pd

KINDS = {
    "copies": {"copies"},
    "copy suppression": {"suppresses", "attends_to_predicted"},
    "suppresses": {"suppresses"},
    "induction": {"induction_score"},
    "previous token": {"previous_token_score"},
    "duplicate token": {"duplicate_token_score"},
}
"""What a head is called, and the scores that must all be clear for it."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TaskHeads(Result):
    """The most important heads of a task: their effect, what they attend to, and what kind they are."""

    task: str
    counterfactual: str
    prompts: tuple[str, ...]
    heads: tuple[tuple[int, int], ...]
    """(layer, head), the largest effect first."""
    by: str
    """What a replaced head carries: `resample`, `mean` or `zero`."""
    metric: str
    effect: Float[Tensor, " head"]
    """Estimated metric with the head replaced less that of the whole model: negative where the head helps."""
    roles: tuple[str, ...]
    """The roles that every prompt has."""
    attention: Float[Tensor, "head role"]
    """Mean attention of the last position to the position of each role."""
    scores: dict[str, Float[Tensor, " head"]]
    """The scores that were given: `copies`, `suppresses` and `attends_to_predicted` by weights, and kinds of
    `score_heads`."""
    nulls: dict[str, Float[Tensor, " head"]]
    """The same scores without their cause."""
    note: str
    """That the model does not do the task; empty where it does."""

    @property
    def columns(self) -> tuple[Column, ...]:  # type: ignore[override]  # the roles are the task's
        return (
            Column("label", "head"),
            Column("effect", signed=True, help="Of replacing the head; negative where it helps."),
            Column("attends", "attends to", help="The role with the most attention of the last position."),
            Column("attention", help="That attention, a mean over prompts."),
            Column(
                "kind",
                help=f"Every score of at least {CLEAR_SCORE:g} and {TIMES_NULL:g} times its null; heads that "
                "copy or suppress tokens do so by their weights. Copy suppression is to suppress tokens and "
                "to attend to them where they are predicted.",
            ),
        )

    @property
    def title(self) -> str:
        return f"Heads of the task {self.task} in {self.model.name}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each head clearly is, with commas between; empty where it is nothing of that."""
        return tuple(self._kind(at) for at in range(len(self.heads)))

    def _kind(self, at: int) -> str:
        clear = {
            name
            for name, values in self.scores.items()
            if float(values[at]) >= CLEAR_SCORE
            and float(values[at]) >= TIMES_NULL * float(self.nulls[name][at])
        }
        found = {words: scores for words, scores in KINDS.items() if scores <= clear}
        # "copy suppression" says that it suppresses
        return ", ".join(
            words for words, scores in found.items() if not any(scores < other for other in found.values())
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head: layer, head, label, effect, attends, attention, kind, one column for each role's
        attention (`attention_S2`), and one for each score."""
        import pandas as pd

        most = self.attention.argmax(1) if self.roles else torch.zeros(len(self.heads), dtype=torch.long)
        table = pd.DataFrame(list(self.heads), columns=["layer", "head"], index=range(len(self.heads)))
        table["label"] = [head_label(*head) for head in self.heads]
        table["effect"] = self.effect.numpy()
        table["attends"] = [self.roles[at] for at in most.tolist()]
        table["attention"] = self.attention.amax(1).numpy()
        table["kind"] = self.kinds
        for at, role in enumerate(self.roles):
            table[f"attention_{role}"] = self.attention[:, at].numpy()
        for name, values in self.scores.items():
            table[name] = values.numpy()
        return table

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The heads with the largest effects, either way."""
        return self.to_dataframe().head(top)[[each.name for each in self.columns]]
