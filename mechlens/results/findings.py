"""Results on factual recall and indirect object identification."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.results.base import Result
from mechlens.results.columns import Column

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Facts(Result):
    """The rank and probability of the answers to factual prompts, read off each layer with the logit lens."""

    relations: tuple[str, ...]
    """What each fact is about, such as `capital of a country`."""
    prompts: tuple[str, ...]
    """Texts that the answer continues."""
    answers: tuple[str, ...]
    """The right next token, as text."""
    others: tuple[str, ...]
    """The null baseline: the answer to another fact of the same relation, which is wrong here."""
    guesses: tuple[str, ...]
    """The model's top-1 prediction."""
    rank: Float[Tensor, "fact row"]
    """Rank of the answer after the prompt's last token; 1 is the most likely token. The rows are the
    embedding and the layers."""
    log_prob: Float[Tensor, "fact row"]
    """Log-probability of the answer, nats."""
    other_rank: Float[Tensor, "fact row"]
    other_log_prob: Float[Tensor, "fact row"]
    prepend_bos: bool

    columns: ClassVar[tuple[Column, ...]] = (
        Column("relation"),
        Column("prompt"),
        Column("answer"),
        Column("guess", "top-1 prediction"),
        Column("rank", help="Rank of the answer; 1 is the most likely token."),
        Column("probability", "probability of the answer"),
        Column("other_rank", "rank of the wrong answer", help="Answer to another fact of the same relation."),
        Column("other_probability", "probability of the wrong answer"),
    )

    @property
    def known(self) -> Bool[Tensor, " fact"]:
        """Whether the answer is the model's top-1 prediction."""
        return self.rank[:, -1] == 1

    def share(self, top: int, *, null: bool = False) -> Float[Tensor, " row"]:
        """The share of facts whose answer is among the `top` most likely tokens, by row.

        Args:
            null: count the wrong answers instead.
        """
        return ((self.other_rank if null else self.rank) <= top).float().mean(0)

    def probability(self, *, null: bool = False) -> Float[Tensor, " row"]:
        """Mean probability of the answer, by row.

        Args:
            null: use the wrong answers instead.
        """
        return (self.other_log_prob if null else self.log_prob).exp().mean(0)

    def summary(self, top: int = 10) -> pd.DataFrame:
        """The first `top` facts, after the last layer."""
        table = self.to_dataframe()
        last = table[table["layer"] == table["layer"].max()]
        return last[[each.name for each in self.columns]].head(top).reset_index(drop=True)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per fact and row of the lens: relation, prompt, answer, other, guess, layer (-1 is the
        embedding), rank, probability, other_rank, other_probability."""
        import pandas as pd

        n_facts, n_rows = self.rank.shape
        index = pd.MultiIndex.from_product([range(n_facts), range(-1, n_rows - 1)], names=["fact", "layer"])
        table = index.to_frame(index=False)
        for name in ("relation", "prompt", "answer", "other"):
            table[name] = [getattr(self, f"{name}s")[fact] for fact in table["fact"]]
        table["guess"] = [self.guesses[fact] for fact in table["fact"]]
        table["rank"] = self.rank.flatten().numpy()
        table["probability"] = self.log_prob.exp().flatten().numpy()
        table["other_rank"] = self.other_rank.flatten().numpy()
        table["other_probability"] = self.other_log_prob.exp().flatten().numpy()
        return table


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class IndirectObject(Result):
    """How clearly a model prefers the indirect object to the subject.

    "When Mary and John went to the store, John gave a drink to" should be continued with Mary.
    """

    templates: tuple[str, ...]
    template: Int[Tensor, " prompt"]
    """Index of the template of each prompt."""
    tokens: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"]
    """The same prompts with the other name as the subject, so that the other answer is right."""
    subjects: tuple[str, ...]
    """The name that occurs twice in each prompt."""
    objects: tuple[str, ...]
    """The name that occurs once in each prompt: the right answer."""
    roles: dict[str, Int[Tensor, " prompt"]]
    """Position of `IO` (the indirect object), `S1` and `S2` (the subject) and `END` (the last token)."""
    logit_diff: Float[Tensor, " prompt"]
    """Logit of the indirect object minus that of the subject at the last token."""
    null: Float[Tensor, " prompt"]
    """The same difference for two names that do not occur in the prompt."""
    rank: Float[Tensor, " prompt"]
    """Rank of the indirect object among all tokens; 1 is the most likely."""
    seed: int

    columns: ClassVar[tuple[Column, ...]] = (
        Column("template"),
        Column("subject"),
        Column("indirect_object"),
        Column("logit_diff", "logit difference", signed=True),
        Column("null", "null baseline", signed=True, help="For two names that do not occur in the prompt."),
        Column("rank", help="Rank of the indirect object; 1 is the most likely token."),
    )

    @property
    def title(self) -> str:
        return f"Indirect object identification in {self.model.name}"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt: template, subject, indirect_object, logit_diff, null, rank."""
        import pandas as pd

        return pd.DataFrame(
            {
                "template": [self.templates[which] for which in self.template.tolist()],
                "subject": self.subjects,
                "indirect_object": self.objects,
                "logit_diff": self.logit_diff.numpy(),
                "null": self.null.numpy(),
                "rank": self.rank.numpy(),
            }
        )
