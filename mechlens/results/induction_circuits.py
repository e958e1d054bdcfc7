"""The result of a search for induction circuits: behavioral, weight and causal evidence, pair by pair."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from mechlens.results.base import Result
from mechlens.results.columns import Column
from mechlens.results.heads import head_label

if TYPE_CHECKING:
    import pandas as pd


LEAST_Z = 3.0
"""A K-composition score supports a pair if it is at least this many standard deviations above the baseline.
Many scores in a trained model are, so this alone selects little."""
UPPER_SHARE = 0.25
"""The previous-token head must be in this top share of the earlier heads by K-composition; the highest always
is."""
LEAST_LOSS = 0.1
"""Share of the induction score that must be lost through the keys alone to support a pair."""
VERDICTS = ("circuit", "in part", "no circuit")
"""Best first."""
VERDICT_RULE = (
    "A pair is a circuit if three tests hold. Behavior: both heads' scores reach the threshold and twice "
    f"their null. Weights: the K-composition is at least {LEAST_Z:g} standard deviations above chance, and "
    f"in the top {UPPER_SHARE:.0%} of all earlier heads (the highest, if there are fewer than 8). Cause: "
    f"ablating the previous-token head in the induction head's keys costs at least {LEAST_LOSS:.0%} of the "
    "induction score. A pair is a circuit in part if behavior and one other test hold."
)
_ON_REPEATED, _NULL = "on repeated tokens", "The same score where nothing repeats."
EVIDENCE = (
    Column("induction_score", "score", help=f"Induction score {_ON_REPEATED}."),
    Column("induction_null", "null", help=_NULL),
    Column("previous_token_score", "previous-token score", help=f"Previous-token score {_ON_REPEATED}."),
    Column("previous_token_null", "its null", help=_NULL),
    Column("k_score", "K-composition"),
    Column("k_z", "above chance, sd", digits=1, help="In standard deviations of random weights."),
    Column("k_rank", "rank", help="Among all earlier heads; 1 is the highest."),
    Column("n_earlier", "earlier heads"),
    Column("k_top1_keys", "top-1, keys"),
    Column("k_top1_queries", "top-1, queries"),
    Column("ov_top1", "OV top-1"),
    Column("ov_copying", "OV copying", help="Eigenvalue copying score."),
    Column("score_path", "score, keys"),
    Column("score_removed", "score, head"),
    Column("loss_path", "loss change, keys", "nats", signed=True),
    Column("loss_path_error", "its error", "nats"),
    Column("loss_removed", "loss change, head", "nats", signed=True),
    Column("loss_removed_error", "its error", "nats"),
)
"""Each is a field of `InductionCircuits`, one number per pair."""
COUNTED = ("k_top1_keys", "k_top1_queries", "ov_top1")
"""The evidence that is a share of the vocabulary, which may be estimated from a sample."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InductionCircuits(Result):
    """Pairs of a previous-token head and an induction head, with the evidence for and against each."""

    pairs: tuple[tuple[int, int, int, int], ...]
    """(layer, head) of the previous-token head, (layer, head) of the induction head."""
    induction_score: Float[Tensor, " pair"]
    """Of the induction head, on repeated tokens."""
    induction_null: Float[Tensor, " pair"]
    previous_token_score: Float[Tensor, " pair"]
    """Of the previous-token head, on repeated tokens."""
    previous_token_null: Float[Tensor, " pair"]
    k_score: Float[Tensor, " pair"]
    """K-composition of the two heads' weights; nan, like `k_z` and `k_rank`, if a head's are zero."""
    k_z: Float[Tensor, " pair"]
    """`k_score` minus the baseline's mean, in the baseline's standard deviations."""
    k_rank: Float[Tensor, " pair"]
    """Rank of `k_score` among all earlier heads; 1 is the highest."""
    n_earlier: Float[Tensor, " pair"]
    """The number of earlier heads."""
    k_top1_keys: Float[Tensor, " pair"]
    """Share of tokens whose entry with itself in the K-composition circuit is the largest for its query."""
    k_top1_queries: Float[Tensor, " pair"]
    """The same for its key."""
    ov_top1: Float[Tensor, " pair"]
    """The same in the induction head's full OV circuit, for its source."""
    ov_copying: Float[Tensor, " pair"]
    """Eigenvalue copying score of that circuit."""
    score_path: Float[Tensor, " pair"]
    """Induction score with the previous-token head ablated in the induction head's keys only."""
    score_removed: Float[Tensor, " pair"]
    """Induction score with the previous-token head ablated."""
    loss_path: Float[Tensor, " pair"]
    """Loss on the second copy with it ablated in the keys only, minus `clean_loss`, nats."""
    loss_path_error: Float[Tensor, " pair"]
    """Standard error over sequences."""
    loss_removed: Float[Tensor, " pair"]
    """Loss on the second copy with it ablated, minus `clean_loss`, nats."""
    loss_removed_error: Float[Tensor, " pair"]
    verdicts: tuple[str, ...]
    """For each pair, one of `VERDICTS` by `VERDICT_RULE`."""
    reasons: tuple[str, ...]
    """The reasons for each verdict, in words."""
    clean_loss: float
    """On the second copy's tokens, nats."""
    chance: float
    """Chance level of a top-1 accuracy: one over the size of the vocabulary."""
    n_tokens: int
    """Tokens that top-1 accuracies are counted over; a random sample if it is not the whole vocabulary."""
    intervals: dict[str, Float[Tensor, "bound pair"]]
    """By name in `COUNTED`: the Clopper-Pearson interval for the whole vocabulary. Both bounds are the
    accuracy itself if all tokens are counted."""
    confidence: float
    """Coverage of `intervals`."""
    tokens: Int[Tensor, "sequence pos"]
    """What the model read: BOS, random tokens, and the same tokens again."""
    seq_len: int
    seed: int
    how: str
    """What replaces an ablated head's output: `mean`, `zero` or `resample`."""
    prepend_bos: bool
    relative_position: int | None
    """In a rotary model, how far the key of the K-composition is before its query: the distance at which a
    perfect induction head attends on these tokens."""
    note: str
    """Why no pair was found; empty if there are pairs."""

    columns: ClassVar = (
        Column("previous", help="The previous-token head."),
        Column("induction", help="The induction head."),
        Column("verdict"),
        *EVIDENCE,
    )

    @property
    def title(self) -> str:
        return f"Induction circuits of {self.model.name}"

    @property
    def labels(self) -> tuple[tuple[str, str], ...]:
        """(previous-token head, induction head) of each pair, as `L4H11`."""
        return tuple((head_label(*pair[:2]), head_label(*pair[2:])) for pair in self.pairs)

    @property
    def strongest(self) -> int | None:
        """The pair with the best verdict and, among these, the largest loss of induction score; None if there
        are none."""
        lost = self.induction_score - self.score_path
        order = [(VERDICTS.index(verdict), -float(lost[at])) for at, verdict in enumerate(self.verdicts)]
        return order.index(min(order)) if order else None

    @property
    def counted(self) -> str:
        """What top-1 accuracies are counted over, and the error of a sample, in a sentence."""
        d_vocab = self.model.d_vocab
        if self.n_tokens == d_vocab:
            return f"Top-1 accuracies are counted over all {d_vocab:,} tokens."
        said = f"Top-1 accuracies are counted over a random sample of {self.n_tokens:,} of {d_vocab:,} tokens"
        if not self.pairs:
            return f"{said}."
        off = max(float((self.intervals[name] - getattr(self, name)).abs().max()) for name in COUNTED)
        return f"{said}: with {self.confidence:.0%} confidence, each is within {off:.3f} of the true value."

    def evidence(self, pair: int) -> dict[str, float]:
        """All numbers of one pair, by name."""
        return {each.name: float(getattr(self, each.name)[pair]) for each in EVIDENCE}

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair: previous, induction (such as `L4H11`), previous_layer, previous_head,
        induction_layer, induction_head, verdict, the evidence (ranks as whole numbers; low and high of each
        top-1 accuracy), reasons."""
        import pandas as pd

        places = ["previous_layer", "previous_head", "induction_layer", "induction_head"]
        rows = [(*labels, *pair) for labels, pair in zip(self.labels, self.pairs, strict=True)]
        table = pd.DataFrame(rows, columns=["previous", "induction", *places])
        table["verdict"] = list(self.verdicts)
        for name in (each.name for each in EVIDENCE):
            # pandas's nullable integers, because a rank can be missing
            whole = name in ("k_rank", "n_earlier")
            table[name] = pd.Series(getattr(self, name).tolist(), dtype="Int64" if whole else "float64")
            if name in self.intervals:
                table[f"{name}_low"], table[f"{name}_high"] = self.intervals[name].double().numpy()
        table["reasons"] = list(self.reasons)
        return table
