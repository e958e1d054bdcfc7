"""Results about what a language model knows and does."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.results.base import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Facts(Result):
    """At which layer the logit lens shows the answer to each of several facts."""

    relations: tuple[str, ...]
    """What each fact is about, such as `capital of a country`."""
    prompts: tuple[str, ...]
    """Texts that the answer continues."""
    answers: tuple[str, ...]
    """The right next token, as text."""
    others: tuple[str, ...]
    """The null: the answer to another fact of the same relation, which is wrong here."""
    guesses: tuple[str, ...]
    """The model's own most likely next token."""
    rank: Float[Tensor, "fact row"]
    """Of the answer after the prompt's last token; rows are the embedding and then the layers. 1 is the most
    likely token."""
    log_prob: Float[Tensor, "fact row"]
    """Of the answer, nats."""
    other_rank: Float[Tensor, "fact row"]
    other_log_prob: Float[Tensor, "fact row"]
    prepend_bos: bool

    @property
    def known(self) -> Bool[Tensor, " fact"]:
        """Whether the answer is the model's first guess."""
        return self.rank[:, -1] == 1

    def share(self, top: int, *, null: bool = False) -> Float[Tensor, " row"]:
        """The share of facts whose answer is among the `top` most likely tokens, by row."""
        return ((self.other_rank if null else self.rank) <= top).float().mean(0)

    def probability(self, *, null: bool = False) -> Float[Tensor, " row"]:
        """Mean probability of the answer, by row."""
        return (self.other_log_prob if null else self.log_prob).exp().mean(0)

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
    """How well a model tells the indirect object from the subject.

    "When Mary and John went to the store, John gave a drink to" is to be continued with Mary.
    """

    templates: tuple[str, ...]
    template: Int[Tensor, " prompt"]
    """Which of them each prompt was made from."""
    tokens: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"]
    """The same prompts with the other name as the subject, so that the right answer is the other one."""
    subjects: tuple[str, ...]
    """The name that stands twice, of each prompt."""
    objects: tuple[str, ...]
    """The name that stands once: the right answer."""
    roles: dict[str, Int[Tensor, " prompt"]]
    """Position of `IO` (the indirect object), `S1` and `S2` (the subject) and `END` (the last token)."""
    logit_diff: Float[Tensor, " prompt"]
    """Logit of the indirect object less that of the subject at the last token."""
    null: Float[Tensor, " prompt"]
    """The same difference of the two names of another prompt, neither of which stands in this one."""
    rank: Float[Tensor, " prompt"]
    """Of the indirect object among all tokens; 1 is the most likely."""
    seed: int

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
