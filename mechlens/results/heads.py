"""Results about attention heads and repeated tokens."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeAlias, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.errors import ArgumentError
from mechlens.results.base import Result
from mechlens.results.columns import Column
from mechlens.text.display import number, turns, visible_token

if TYPE_CHECKING:
    import pandas as pd


CLEAR_SCORE = 0.4
"""Default threshold: the mean score from which a head counts as one of a kind."""
TIMES_NULL = 5.0
"""How many times its null baseline a clear score must be."""


SCORES = {
    column.name: column
    for column in (
        Column(
            "induction_score",
            help="Mean attention from each token of a later copy to the token after its earlier occurrence; "
            "1 is a perfect induction head.",
        ),
        Column(
            "induction_diagonal_score",
            help="The induction score over the whole diagonal of the pattern, including two entries that are "
            "not induction; a published variant, for comparison only.",
        ),
        Column("previous_token_score", help="Mean attention from each position to the one before it."),
        Column("duplicate_token_score", help="Mean attention from each token to its earlier occurrence."),
        Column(
            "first_token_score",
            help="Mean attention from each later position to the first, where idle heads rest.",
        ),
        Column(
            "attention_sink_score",
            help="The largest mean attention that one position in the first half receives from all later "
            "ones, wherever idle heads rest; the first-token score where they rest on the first.",
        ),
        Column(
            "prefix_matching_score",
            help="Mean attention to the tokens after all earlier copies, on 25 random tokens repeated four "
            "times. Several earlier copies share the attention, so a perfect head scores about 0.5.",
        ),
        Column(
            "copying_score",
            help="The attended token's share of all logits that the head raises among the 25 sampled tokens, "
            "scaled to [-1, 1]: 1 if it raises only that token, -1 if it never does. A head that ignores "
            "which token it attends to scores as low as its null, about -0.9.",
        ),
    )
}
"""The head scores, with their definitions."""


def score_range(kind: str) -> tuple[float, float]:
    """The values that a score can have: [-1, 1] for the copying score, [0, 1] for scores of patterns."""
    return (-1.0, 1.0) if kind == "copying_score" else (0.0, 1.0)


def score_title(kind: str) -> str:
    """A score as a title: `Induction score`."""
    return kind.replace("_", " ").capitalize()


def head_label(layer: int, head: int) -> str:
    """A head's name in text, such as `L5H5`."""
    return f"L{layer}H{head}"


def head_table(**values: Float[Tensor, "layer head"]) -> pd.DataFrame:
    """One row per head: layer, head, label, and a column for each of the values."""
    import pandas as pd

    n_layers, n_heads = next(iter(values.values())).shape
    places = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    table = pd.DataFrame(places, columns=["layer", "head"])
    table["label"] = [head_label(*place) for place in places]
    return table.assign(**{name: each.flatten().numpy() for name, each in values.items()})


Head: TypeAlias = "str | tuple[int, int]"
Heads: TypeAlias = "Head | Sequence[Head]"


def parse_head(head: Head) -> tuple[int, int]:
    """(layer, head) of a head written `L5H5`, `5.5` or `(5, 5)`.

    Raises:
        TypeError: the head is neither a text nor a pair of integers.
        ValueError: the text has another form, or there are not two integers.
    """
    if isinstance(head, str):
        found = re.fullmatch(r"L?(\d+)[H.](\d+)", head.strip(), re.IGNORECASE)
        if found:
            return int(found[1]), int(found[2])
    else:
        try:
            numbers = [operator.index(number) for number in head]
        except TypeError:
            raise TypeError(f"a head is written L5H5, 5.5 or (5, 5), with integers, got {head!r}") from None
        if len(numbers) == 2:
            return numbers[0], numbers[1]
    raise ValueError(f"a head is written L5H5, 5.5 or (5, 5), got {head!r}")


def check_in_range(layer: int, head: int, n_layers: int, n_heads: int) -> None:
    """Refuse a head that the model does not have."""
    if not (0 <= layer < n_layers and 0 <= head < n_heads):
        raise ValueError(
            f"head {head_label(layer, head)} is out of range: the model has layers 0 to {n_layers - 1} with "
            f"heads 0 to {n_heads - 1}"
        )


def parse_heads(heads: Heads) -> list[tuple[int, int]]:
    """`parse_head` for one head or several."""
    one = isinstance(heads, str) or (isinstance(heads, tuple) and all(hasattr(n, "__index__") for n in heads))
    several = cast("Sequence[Head]", [heads] if one else heads)
    return [parse_head(head) for head in several]


def half_means(
    values: Float[Tensor, "*sequence pos"], half: str, *, seq_len: int, prepend_bos: bool
) -> Float[Tensor, "*sequence"]:
    """Mean over the positions that predict the tokens of the first or the second copy.

    Args:
        values: position i has the value of token i + 1; the last position predicts nothing.
        half: `first` or `second`.
    """
    second = int(prepend_bos) + seq_len
    positions = slice(0, second - 1) if half == "first" else slice(second - 1, -1)
    return values[..., positions].mean(-1)


def written_range(low: float, high: float) -> str:
    """An interval as text; empty if there is none (nan, for a single sequence)."""
    return "" if low != low else f"{number(low)} to {number(high)}"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RepeatedTokenPerformance(Result):
    """How well a model predicts random tokens the first and the second time they occur."""

    tokens: Int[Tensor, "seed batch pos"]
    """What the model read: BOS (if any), the random tokens, and the same tokens again."""
    log_prob: Float[Tensor, "seed batch pos"]
    """Log-probability (nats) of the correct token *after* each position; nan at the last one."""
    correct: Bool[Tensor, "seed batch pos"]
    """Whether the most likely token after each position was the correct one; False at the last one."""
    estimates: dict[str, tuple[float, float, float]]
    """(mean, low, high) of `first_half_log_prob`, `second_half_log_prob` in nats and of
    `first_half_accuracy`, `second_half_accuracy` in [0, 1]."""
    single_draws: dict[str, tuple[float, float]]
    """For each estimate, the interval that contains 99% of single sequences."""
    seq_len: int
    """Random tokens in one copy."""
    seeds: tuple[int, ...]
    prepend_bos: bool
    confidence: float
    """Coverage of the intervals in `estimates`, by bootstrap over sequences."""

    columns: ClassVar = (
        Column("measure", " "),
        Column("mean"),
        Column("interval", help="Bootstrap interval of the mean over sequences."),
        Column("single", "99% of single sequences"),
    )

    def summary(self, top: int = 4) -> pd.DataFrame:
        """Mean log-probability and accuracy on each copy, with intervals."""
        import pandas as pd

        rows = []
        for name, (mean, low, high) in self.estimates.items():
            half, measure = name.split("_half_")
            words = "log-probability, nats" if measure == "log_prob" else "top-1 accuracy"
            interval, single = written_range(low, high), written_range(*self.single_draws[name])
            rows.append((f"{words}, {half} copy", mean, interval, single))
        return pd.DataFrame(rows[:top], columns=[each.name for each in self.columns])

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
    """The null baseline of each score that has one; see `score_heads`."""
    intervals: dict[str, Float[Tensor, "bound layer head"]]
    """Lower and upper bound of each mean score, by bootstrap over sequences."""
    tokens: dict[str, Int[Tensor, "seed batch pos"]]
    """What the model read, by kind of sequence: `repeated`, `unrelated`, ..."""
    seq_len: int | None
    """Random tokens in one copy; None for a prompt."""
    jitter: int
    """The largest number of random tokens between the copies; 0 is a fixed period."""
    seeds: tuple[int, ...]
    """Empty for a prompt."""
    prepend_bos: bool
    confidence: float
    """Coverage of `intervals`."""

    columns: ClassVar = (
        Column("kind", "score"),
        Column("label", "head"),
        Column("score", "mean", help="Mean over sequences."),
        Column("interval", help="Bootstrap interval of the mean over sequences."),
        Column("null", help="The same score on unrelated tokens; see `score_heads`."),
    )

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.scores)

    def mean(self, kind: str) -> Float[Tensor, "layer head"]:
        """Mean score over all sequences that have one; nan if none has."""
        return self._of(self.scores, kind).nanmean((0, 1))

    def null(self, kind: str) -> Float[Tensor, "layer head"]:
        """Mean null over all sequences that have one; nan if none has."""
        if not self.nulls:
            raise ValueError("this result has no null baselines")
        return self._of(self.nulls, kind).nanmean((0, 1))

    def _of(self, values: Mapping[str, Tensor], kind: str) -> Tensor:
        if kind not in values:
            raise ArgumentError("kind", f"one of {', '.join(values)}", kind)
        return values[kind]

    def ranked(self, kind: str) -> Iterator[tuple[tuple[int, int], float]]:
        """Every ((layer, head), mean score), highest first; heads without a score are left out."""
        mean = self.mean(kind)
        n_heads = mean.shape[1]
        flat = mean.flatten()
        for index in flat.argsort(descending=True, stable=True).tolist():
            if not torch.isnan(flat[index]):
                yield (index // n_heads, index % n_heads), float(flat[index])

    @property
    def n_sequences(self) -> int:
        """The largest number of sequences that a score is averaged over."""
        return max(values.shape[0] * values.shape[1] for values in self.scores.values())

    def summary(self, top: int | Mapping[str, int] = 5) -> pd.DataFrame:
        """The `top` heads of each score (`top` may give a number for each), with interval and null."""
        import pandas as pd

        rows: list[tuple[str, str, float, str, float]] = []
        for kind in self.kinds:
            low, high = self.intervals[kind]
            null = self.null(kind) if kind in self.nulls else torch.full_like(low, torch.nan)
            best = list(self.ranked(kind))[: top if isinstance(top, int) else top[kind]]
            for head, score in best:
                interval = written_range(float(low[head]), float(high[head]))
                rows.append((kind, head_label(*head), score, interval, float(null[head])))
            if not best:
                rows.append((kind, "none", math.nan, "", math.nan))
        return pd.DataFrame(rows, columns=[each.name for each in self.columns])

    def clear_heads(
        self, kind: str, threshold: float = CLEAR_SCORE, times_null: float = TIMES_NULL
    ) -> list[tuple[tuple[int, int], float]]:
        """((layer, head), mean score) of the heads that are clearly of a kind, highest first.

        Args:
            threshold: the minimum mean score.
            times_null: the minimum multiple of the head's null baseline; 0 ignores the null, for example for
                scores on a prompt, which have none.

        Raises:
            ValueError: the result has no such kind, or no null for it.
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

    @property
    def labels(self) -> tuple[str, ...]:
        """The heads as text."""
        return tuple(head_label(*head) for head in self.heads)

    @property
    def shown_tokens(self) -> list[str]:
        """The tokens with whitespace visible; the first token of a turn is preceded by its role."""
        begins = turns(self.token_strings)
        return [
            (f"{begins[at]}: " if at in begins else "") + visible_token(token, longest=16)
            for at, token in enumerate(self.token_strings)
        ]

    def summary(self, top: int = 64) -> pd.DataFrame:
        """For each of the last `top` tokens and each head, the token attended to most."""
        import pandas as pd

        tokens = self.shown_tokens
        values, places = self.patterns.max(-1)
        shown = range(max(0, len(tokens) - top), len(tokens))
        table = pd.DataFrame({"pos": shown, "token": [tokens[dest] for dest in shown]})
        for label, attention, sources in zip(self.labels, values.tolist(), places.tolist(), strict=True):
            table[label] = [f"{attention[at]:.2f} {tokens[sources[at]]} ({sources[at]})" for at in shown]
        return table

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
