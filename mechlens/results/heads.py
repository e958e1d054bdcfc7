"""Results about attention heads and repeated tokens."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.results.base import Result

if TYPE_CHECKING:
    import pandas as pd


CLEAR_SCORE = 0.4
"""The mean score at which a head counts as one of its kind, where no other threshold is given."""
TIMES_NULL = 5.0
"""How many times its null baseline a clear score is."""


def head_label(layer: int, head: int) -> str:
    """A head's name in text, such as `L5H5`."""
    return f"L{layer}H{head}"


Head: TypeAlias = "str | tuple[int, int]"
Heads: TypeAlias = "Head | Sequence[Head]"


def parse_head(head: Head) -> tuple[int, int]:
    """(layer, head) of a head given as that, as `L5H5` or as `5.5`.

    Raises:
        TypeError: no text and no pair of whole numbers.
        ValueError: another text, or not two numbers.
    """
    if isinstance(head, str):
        found = re.fullmatch(r"L?(\d+)[H.](\d+)", head.strip(), re.IGNORECASE)
        if found:
            return int(found[1]), int(found[2])
    else:
        try:
            numbers = [operator.index(number) for number in head]
        except TypeError:
            raise TypeError(
                f"a head is written L5H5, 5.5 or (5, 5), with whole numbers, but this is {head!r}"
            ) from None
        if len(numbers) == 2:
            return numbers[0], numbers[1]
    raise ValueError(f"a head is written L5H5, 5.5 or (5, 5), but this is {head!r}")


def parse_heads(heads: Heads) -> list[tuple[int, int]]:
    """The same of several heads; one by itself is one."""
    one = isinstance(heads, str) or (isinstance(heads, tuple) and all(hasattr(n, "__index__") for n in heads))
    several = cast("Sequence[Head]", [heads] if one else heads)
    return [parse_head(head) for head in several]


def half_means(
    values: Float[Tensor, "*sequence pos"], half: str, *, seq_len: int, prepend_bos: bool
) -> Float[Tensor, "*sequence"]:
    """Mean over the positions that predict the first or the second copy's tokens.

    Args:
        values: per position i, of the token i + 1; the last position predicts nothing.
        half: `first` or `second`.
    """
    second = int(prepend_bos) + seq_len
    positions = slice(0, second - 1) if half == "first" else slice(second - 1, -1)
    return values[..., positions].mean(-1)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RepeatedTokenPerformance(Result):
    """How well a model predicts random tokens the first and the second time they come."""

    tokens: Int[Tensor, "seed batch pos"]
    """What the model read: BOS (where there is one), the random tokens, the same again."""
    log_prob: Float[Tensor, "seed batch pos"]
    """Log-probability in nats of the right token *after* each position; nan at the last one."""
    correct: Bool[Tensor, "seed batch pos"]
    """Whether the most likely token after each position was the right one; False at the last one."""
    estimates: dict[str, tuple[float, float, float]]
    """(mean, low, high) of `first_half_log_prob`, `second_half_log_prob` in nats and of
    `first_half_accuracy`, `second_half_accuracy` in [0, 1]."""
    single_draws: dict[str, tuple[float, float]]
    """For each estimate, the interval that holds 99% of single sequences."""
    seq_len: int
    """Random tokens in one copy."""
    seeds: tuple[int, ...]
    prepend_bos: bool
    confidence: float
    """Coverage of the intervals in `estimates`, by bootstrap over sequences."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per sequence and position: seed, sequence, pos, id (of the token read), log_prob, correct,
        half.

        `half` is 1 or 2: the copy that the *predicted* token belongs to. The last position predicts
        nothing and is left out.
        """
        import pandas as pd

        n_pos = self.tokens.shape[-1]
        first = int(self.prepend_bos)
        rows = [
            (seed, row, pos, token, log_prob, correct, 1 if pos + 1 < first + self.seq_len else 2)
            for seed, tokens, log_probs, corrects in zip(
                self.seeds, self.tokens.tolist(), self.log_prob.tolist(), self.correct.tolist(), strict=True
            )
            for row in range(len(tokens))
            for pos, (token, log_prob, correct) in enumerate(
                zip(tokens[row], log_probs[row], corrects[row], strict=True)
            )
            if pos < n_pos - 1
        ]
        return pd.DataFrame(rows, columns=["seed", "sequence", "pos", "id", "log_prob", "correct", "half"])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Result):
    """Scores of every attention head, per sequence, with intervals and nulls."""

    scores: dict[str, Float[Tensor, "seed batch layer head"]]
    """By kind of score. Scores of patterns lie in [0, 1], `copying_score` in [-1, 1]."""
    nulls: dict[str, Float[Tensor, "seed batch layer head"]]
    """The same measure where its cause is taken away; see `score_heads`. A kind may have none."""
    intervals: dict[str, Float[Tensor, "bound layer head"]]
    """Lower and upper bound of each mean score, by bootstrap over sequences."""
    tokens: dict[str, Int[Tensor, "seed batch pos"]]
    """What the model read, by kind of sequence: `repeated`, `unrelated`, ..."""
    seq_len: int | None
    """Random tokens in one copy; None for a prompt that the user gave."""
    jitter: int
    """Most random tokens that came between the copies; 0 is a fixed period."""
    seeds: tuple[int, ...]
    """Empty for a prompt that the user gave."""
    prepend_bos: bool
    confidence: float
    """Coverage of `intervals`."""

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.scores)

    def mean(self, kind: str) -> Float[Tensor, "layer head"]:
        """Mean score over all sequences that have one; nan where none has."""
        return self._of(self.scores, kind).nanmean((0, 1))

    def null(self, kind: str) -> Float[Tensor, "layer head"]:
        """Mean null over all sequences that have one; nan where none has."""
        return self._of(self.nulls, kind).nanmean((0, 1))

    def _of(self, values: Mapping[str, Tensor], kind: str) -> Tensor:
        if kind not in values:
            raise ValueError(f"no {kind!r} in this result, which has {', '.join(values) or 'none'}")
        return values[kind]

    def ranked(self, kind: str) -> Iterator[tuple[tuple[int, int], float]]:
        """Every ((layer, head), mean score), the highest first; heads with no score are left out."""
        mean = self.mean(kind)
        n_heads = mean.shape[1]
        flat = mean.flatten()
        for index in flat.argsort(descending=True, stable=True).tolist():
            if not torch.isnan(flat[index]):
                yield (index // n_heads, index % n_heads), float(flat[index])

    def clear_heads(
        self, kind: str, threshold: float = CLEAR_SCORE, times_null: float = TIMES_NULL
    ) -> list[tuple[tuple[int, int], float]]:
        """((layer, head), mean score) of the heads that are clearly of a kind, the highest first.

        Args:
            threshold: the least mean score.
            times_null: the least multiple of the head's null baseline; 0 ignores the null, which scores on a
                prompt do not have.

        Raises:
            ValueError: the result has no such kind, or no null of it.
        """
        above = [(head, score) for head, score in self.ranked(kind) if score >= threshold]
        if times_null == 0:
            return above
        null = self.null(kind)
        return [(head, score) for head, score in above if score >= times_null * float(null[head])]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per kind and head: kind, layer, head, label, score, low, high, null, sequences."""
        import pandas as pd

        rows = []
        for kind in self.kinds:
            mean, (low, high) = self.mean(kind), self.intervals[kind]
            null = self.null(kind) if kind in self.nulls else torch.full_like(mean, torch.nan)
            sequences = self.scores[kind].shape[0] * self.scores[kind].shape[1]
            for layer in range(mean.shape[0]):
                for head in range(mean.shape[1]):
                    numbers = [float(each[layer, head]) for each in (mean, low, high, null)]
                    rows.append((kind, layer, head, head_label(layer, head), *numbers, sequences))
        columns = ["kind", "layer", "head", "label", "score", "low", "high", "null", "sequences"]
        return pd.DataFrame(rows, columns=columns)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AttentionPatterns(Result):
    """The attention patterns of some heads on one sequence."""

    tokens: Int[Tensor, " pos"]
    token_strings: tuple[str, ...]
    heads: tuple[tuple[int, int], ...]
    """(layer, head) of each pattern."""
    patterns: Float[Tensor, "pattern dest src"]
    """Attention after softmax; each row sums to 1."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head and pair of positions dest >= src: layer, head, dest, src, attention."""
        import pandas as pd

        n_pos = len(self.token_strings)
        dest, src = torch.tril_indices(n_pos, n_pos)
        tables = [
            pd.DataFrame(
                {
                    "layer": layer,
                    "head": head,
                    "dest": dest.numpy(),
                    "src": src.numpy(),
                    "attention": pattern[dest, src].float().cpu().numpy(),
                }
            )
            for (layer, head), pattern in zip(self.heads, self.patterns, strict=True)
        ]
        return pd.concat(tables, ignore_index=True)
