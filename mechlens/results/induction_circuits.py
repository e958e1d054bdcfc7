"""The table of evidence for induction circuits: behaviour, weights and cause, pair by pair."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from mechlens.results.base import Result
from mechlens.results.heads import head_label

if TYPE_CHECKING:
    import pandas as pd


LEAST_Z = 3.0
"""Standard deviations over the baseline from which a K-composition score speaks for a pair. In a trained
model many scores are, so this alone selects little."""
UPPER_SHARE = 0.25
"""Share of the earlier heads, those that compose most, to which the previous-token head must belong; one head
always does."""
LEAST_FALL = 0.1
"""Share of the induction score that must be lost through the keys alone, to speak for a pair."""
COUNTED = ("k_top1_keys", "k_top1_queries", "ov_top1")
"""The evidence that is a share of the vocabulary's tokens, and may be counted over a sample of them."""
VERDICT_RULE = (
    "A pair is a circuit where both heads attend as in one (both scores reach the threshold and twice their "
    f"null), their K-composition is at least {LEAST_Z:g} standard deviations over chance and among the "
    f"highest {UPPER_SHARE:.0%} of all earlier heads' (the highest alone, of fewer than 8), and at least "
    f"{LEAST_FALL:.0%} of the induction score is lost without the previous-token head in the keys; in part, "
    "where they attend so and one of the others holds."
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InductionCircuits(Result):
    """Pairs of a previous-token head and an induction head, with what speaks for and against each."""

    pairs: tuple[tuple[int, int, int, int], ...]
    """(layer, head) of the previous-token head, (layer, head) of the induction head."""
    evidence: dict[str, Float[Tensor, " pair"]]
    """By name, one number for each pair:

    - behaviour, on repeated tokens: `induction_score`, `induction_null`, `previous_token_score`,
      `previous_token_null`;
    - weights: `k_score` (K-composition), `k_z` (over the baseline, in its standard deviations), `k_rank`
      (among all earlier heads, 1 is the highest), all three nan where a head's weights are zero, and
      `n_earlier`; `k_top1_keys` and `k_top1_queries`, how often a token's entry with itself is larger than
      all others for its query and for its key in the K-composition circuit; `ov_top1`, the same of the
      induction head's full OV circuit for its source, and `ov_copying`, its eigenvalue copying score;
    - cause: `score_path` and `score_removed`, the induction score when the previous-token head is ablated as
      seen through the induction head's keys alone, and altogether; `loss_path` and `loss_removed`, what
      the second copy's loss is then less `clean_loss`, nats, with `loss_path_error` and
      `loss_removed_error`, standard errors over sequences.
    """
    verdicts: tuple[str, ...]
    """Of each pair: `circuit`, `in part` or `no circuit`, by `VERDICT_RULE`."""
    reasons: tuple[str, ...]
    """Of each verdict, in words."""
    clean_loss: float
    """Of the second copy's tokens, nats."""
    chance: float
    """Of a top-1 accuracy: one in the vocabulary."""
    n_tokens: int
    """Of the vocabulary's tokens, those that top-1 accuracies are counted over; drawn where it is not all."""
    intervals: dict[str, Float[Tensor, "bound pair"]]
    """By name of a top-1 accuracy: between what two values that of all tokens lies, by Clopper and Pearson;
    the accuracy itself twice where all are counted."""
    confidence: float
    """Coverage of `intervals`."""
    tokens: Int[Tensor, "sequence pos"]
    """What the model read: BOS, random tokens and the same again."""
    seq_len: int
    seed: int
    how: str
    """What is put in the place of an ablated head: `mean`, `zero` or `resample`."""
    prepend_bos: bool
    relative_position: int | None
    """Of a rotary model: how far before its query the key of K-composition stands; that of a perfect
    induction head on these tokens."""
    note: str
    """Why there is no pair, where there is none; else empty."""

    @property
    def labels(self) -> tuple[tuple[str, str], ...]:
        """(previous-token head, induction head) of each pair, as `L4H11`."""
        return tuple((head_label(*pair[:2]), head_label(*pair[2:])) for pair in self.pairs)

    @property
    def counted(self) -> str:
        """What top-1 accuracies are counted over, and what a sample costs, in a sentence."""
        d_vocab = self.model.d_vocab
        if self.n_tokens == d_vocab:
            return f"Top-1 accuracies are counted over all {d_vocab} tokens."
        said = f"Top-1 accuracies are counted over {self.n_tokens} of the {d_vocab} tokens, drawn at random"
        if not self.pairs:
            return f"{said}."
        off = max(float((self.intervals[name] - self.evidence[name]).abs().max()) for name in COUNTED)
        return f"{said}: those of all lie at most {off:.3f} away, each with {self.confidence:.0%} confidence."

    def to_dataframe(self) -> pd.DataFrame:
        """One row per pair: previous, induction (such as `L4H11`), previous_layer, previous_head,
        induction_layer, induction_head, verdict, the evidence (its ranks whole numbers; low and high
        of each top-1 accuracy), reasons."""
        import pandas as pd

        places = ["previous_layer", "previous_head", "induction_layer", "induction_head"]
        rows = [(*labels, *pair) for labels, pair in zip(self.labels, self.pairs, strict=True)]
        table = pd.DataFrame(rows, columns=["previous", "induction", *places])
        table["verdict"] = list(self.verdicts)
        for name, values in self.evidence.items():
            # pandas's own whole numbers, because a rank can be absent
            counted = name in ("k_rank", "n_earlier")
            table[name] = pd.Series(values.tolist(), dtype="Int64" if counted else "float64")
            if name in self.intervals:
                table[f"{name}_low"], table[f"{name}_high"] = self.intervals[name].double().numpy()
        table["reasons"] = list(self.reasons)
        return table
