"""Sections on repeated tokens, head scores and attention patterns."""

from __future__ import annotations

from collections.abc import Mapping

import mechlens
from mechlens.results import AttentionPatterns, HeadScores, RepeatedTokenPerformance, head_label
from mechlens.results.columns import Column
from mechlens.results.heads import SCORES, score_range, score_title
from mechlens.show.section import Figure, Section, Table, joined
from mechlens.text.display import count, number

_NULL = (
    "The same score on unrelated tokens. For scores of positions (previous and first token): the score if "
    "each position spread its attention at random over what it can see, and for sinks evenly. For copying: "
    "the score with another token in place of the attended one. A score means something only if it is well "
    "above its null."
)
_TERMS = {
    "Nat": "Unit of log-probability with the natural logarithm: a probability of 1/2 is -0.69 nats.",
    "Interval": "Bootstrap confidence interval of the mean, over sequences.",
}


def performance_section(
    result: RepeatedTokenPerformance, *, title: str = "Repeated random tokens", text: str = ""
) -> Section:
    """How well the model predicts random tokens the first and the second time."""
    n_seeds, batch, _ = result.tokens.shape
    means = [number(result.estimates[f"{half}_half_log_prob"][0], 2) for half in ("first", "second")]
    said = (
        f"The model reads {'BOS, ' if result.prepend_bos else ''}{result.seq_len} random tokens and the same "
        f"{result.seq_len} again. The first copy cannot be predicted. The second can, by a model that looks "
        f"up what came next the first time. {count(n_seeds * batch, 'sequence')} from "
        f"{count(n_seeds, 'seed')}."
    )
    return Section(
        title,
        joined(text, said),
        (
            Figure(
                lambda: mechlens.plot_log_probs(result),
                "Log-probability of the correct token at each position: higher is better, 0 nats is "
                "certainty. The line is the mean, and the band contains 90% of the sequences.",
                f"Mean {means[0]} nats over the first copy, {means[1]} over the second.",
            ),
            Table.of(
                result.summary(),
                _with_interval(result.columns, result.confidence),
                "Means over all sequences",
            ),
        ),
        _TERMS,
    )


def scores_section(
    result: HeadScores, *, top: int | Mapping[str, int] = 10, title: str = "Head scores", text: str = ""
) -> Section:
    """Every score of every head, and the strongest heads with their nulls.

    Args:
        top: number of heads to list for each score; one number, or one per score.
    """
    jitter = f", up to {result.jitter} random tokens between the copies" if result.jitter else ""
    source = (
        "A prompt"
        if result.seq_len is None
        else f"Repeated random tokens ({result.seq_len} per copy{jitter})"
    )
    said = (
        f"{source}, {count(result.n_sequences, 'sequence')}{'' if result.prepend_bos else ', no BOS'}. L3H1 "
        "is head 1 of layer 3, counted from 0. A head without a score is gray."
    )
    figures = [figure for kind in result.kinds for figure in _score_figures(result, kind)]
    columns = _with_interval(result.columns, result.confidence)
    return Section(
        title,
        joined(text, said),
        [*figures, Table.of(result.summary(top), columns, "The highest heads of each score", folded=True)],
        {score_title(kind): SCORES[kind].help for kind in result.kinds if kind in SCORES}
        | {"Null": _NULL, "Interval": _TERMS["Interval"]},
    )


def _score_figures(result: HeadScores, kind: str) -> tuple[Figure, Figure]:
    """The heatmap of a score, and its strongest heads beside their nulls."""
    title, (low, high) = score_title(kind), score_range(kind)
    best = list(result.ranked(kind))[:5]
    named = ", ".join(f"{head_label(*head)} {number(score, 2)}" for head, score in best)
    return (
        Figure(
            lambda: mechlens.plot_head_scores(result, kind),
            f"{title} of every head, from {number(low, 0)} to {number(high, 0)}, with layer 0 at the bottom. "
            "Hover for numbers.",
            f"Heatmap of the {title.lower()} by layer and head. Highest: {named or 'none'}.",
            wide=False,
        ),
        Figure(
            lambda: mechlens.plot_scores_against_nulls(result, kind),
            f"The heads with the highest {title.lower()}: dots are scores with their {result.confidence:.0%} "
            f"intervals{', diamonds their nulls' if kind in result.nulls else ''}.",
            f"Highest: {named or 'none'}.",
            wide=False,
        ),
    )


def attention_section(
    result: AttentionPatterns, *, top: int = 64, title: str = "Attention patterns", text: str = ""
) -> Section:
    """The attention of some heads on one sequence, and what each of the last `top` tokens attends to most."""
    table = result.summary(top)
    left_out = len(result.token_strings) - len(table)
    more = f" The last {len(table)} of {len(result.token_strings)} tokens." if left_out else ""
    return Section(
        title,
        text,
        (
            Figure(
                lambda: mechlens.plot_attention(result),
                f"Attention of {', '.join(result.labels)}, from 0 (white) to 1 (dark): each row is a query "
                "token, each column a key token. Choose a head, then hover for numbers.",
            ),
            Table.of(
                table,
                [Column(str(name)) for name in table.columns],
                f"The token that each token attends to most, with its position.{more}",
                folded=True,
            ),
        ),
    )


def _with_interval(columns: tuple[Column, ...], confidence: float) -> list[Column]:
    """The columns, with the coverage of the interval in its title."""
    return [
        Column(each.name, f"{confidence:.0%} interval") if each.name == "interval" else each
        for each in columns
    ]


SECTIONS = {
    RepeatedTokenPerformance: performance_section,
    HeadScores: scores_section,
    AttentionPatterns: attention_section,
}
