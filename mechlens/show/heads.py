"""A report's sections on the repeated-token experiment: results in, `Section`s out."""

from __future__ import annotations

from mechlens.plots.heads import (
    COVERAGE,
    kind_title,
    plot_attention,
    plot_head_scores,
    plot_log_probs,
    plot_scores_against_nulls,
    score_range,
)
from mechlens.results import AttentionPatterns, HeadScores, RepeatedTokenPerformance, head_label
from mechlens.show.section import Figure, Section, Table
from mechlens.text.display import number

KIND_TERMS = {
    "induction_score": (
        "Mean attention that the tokens of the later copy pay to the token after the earlier occurrence of "
        "themselves; 1 is a perfect induction head."
    ),
    "induction_diagonal_score": (
        "The induction score over the whole diagonal of the attention pattern, with two entries that are no "
        "induction: a variant that others published, for comparison only."
    ),
    "previous_token_score": "Mean attention that each position pays to the one before it.",
    "duplicate_token_score": "Mean attention that tokens pay to the earlier occurrence of themselves.",
    "first_token_score": "Mean attention that each position but the first pays to the first: a head at rest.",
    "prefix_matching_score": (
        "Mean attention to the tokens after every earlier copy, with 25 random tokens four times over; a "
        "position with several earlier copies shares its attention among them, so a perfect head scores "
        "about 0.5."
    ),
    "copying_score": (
        "Twice the share that the token attended to has in all that the head raises among the logits of the "
        "sample's 25 tokens, less 1: 1 if it raises that token alone, -1 if never. A head that does not care "
        "which token it attends to comes out at its null, about -0.9."
    ),
}

_TERMS = {
    "Nat": "Unit of log-probability with the natural logarithm: a probability of 1/2 is -0.69 nats.",
    "Null": (
        "The same score where its cause is taken away: on tokens that do not repeat; for the scores of "
        "positions alone (previous and first token), if each position spread its attention at random over "
        "what it can see; for copying, with another token in the place of the one attended to. A score says "
        "something only as far as it stands clear of its null."
    ),
    "Interval": "Bootstrap confidence interval of the mean, over sequences.",
}


def repeated_token_section(result: RepeatedTokenPerformance) -> Section:
    """How well the model predicts random tokens the first and the second time."""
    n_seeds, batch, _ = result.tokens.shape
    bos = "a BOS token, " if result.prepend_bos else "no BOS token, "
    rows = []
    for half in ("first", "second"):
        for measure, unit in (("log_prob", "log-probability, nats"), ("accuracy", "top-1 accuracy")):
            name = f"{half}_half_{measure}"
            mean, *interval = result.estimates[name]
            rows.append((f"{half} copy, {unit}", mean, _range(*interval), _range(*result.single_draws[name])))
    means = [number(result.estimates[f"{half}_half_log_prob"][0], 2) for half in ("first", "second")]
    return Section(
        "Random tokens, twice",
        f"The model reads {bos}{result.seq_len} random tokens and the same {result.seq_len} again. The "
        "first copy cannot be guessed; the second can, by a model that looks up what came next last time. "
        f"{n_seeds * batch} sequences, from {n_seeds} {'seeds' if n_seeds != 1 else 'seed'}.",
        (
            Figure(
                plot_log_probs(result),
                "How likely the model found the right token at each position: higher is better, 0 nats is "
                f"certainty. The line is the mean, the band holds {COVERAGE:.0%} of the sequences.",
                "Log-probability of the right token by position: mean "
                f"{means[0]} nats over the first copy, {means[1]} over the second.",
            ),
            Table(
                ("", "mean", f"{result.confidence:.0%} interval", "99% of single sequences"),
                rows,
                "Means over all sequences, beside the range of single sequences",
            ),
        ),
        {term: _TERMS[term] for term in ("Nat", "Interval")},
    )


def head_scores_section(result: HeadScores, *, top: int = 10) -> Section:
    """Every kind of score of every head, and the strongest heads against their nulls.

    Args:
        top: how many heads of each kind are drawn beside their nulls and listed.
    """
    parts: list[Figure | Table] = []
    rows = []
    for kind in result.kinds:
        title = kind_title(kind)
        low, high = score_range(kind)
        ranked = list(result.ranked(kind))[:top]
        bounds, null = result.intervals[kind], result.null(kind) if kind in result.nulls else None
        for head, score in ranked:
            interval = _range(float(bounds[0][head]), float(bounds[1][head]))
            beside = float(null[head]) if null is not None else None
            rows.append((title, head_label(*head), score, interval, beside))
        named = ", ".join(f"{head_label(*head)} {number(score, 2)}" for head, score in ranked[:5])
        named = named or "no head has a score"
        parts += [
            Figure(
                plot_head_scores(result, kind),
                f"{title} of every head, from {number(low, 0)} to {number(high, 0)}; layer 0 is at the "
                "bottom, a head without a score is grey. Point at a cell for the head's name and numbers.",
                f"Heatmap of the {title.lower()} by layer and head. Highest: {named}.",
                wide=False,
            ),
            Figure(
                plot_scores_against_nulls(result, kind, top=top),
                f"The heads with the highest {title.lower()}: dots are scores with their "
                f"{result.confidence:.0%} intervals"
                + (
                    ", diamonds their nulls. Only what stands clear of its null is a finding."
                    if null is not None
                    else "."
                ),
                f"Highest {title.lower()}s: {named}.",
                wide=False,
            ),
        ]
    parts.append(
        Table(
            ("kind", "head", "score", f"{result.confidence:.0%} interval", "null"),
            rows,
            f"The {top} highest heads of each kind as a table",
            folded=True,
        )
    )
    jitter = f", up to {result.jitter} random tokens between the copies" if result.jitter else ""
    source = (
        "The attention patterns of a given prompt"
        if result.seq_len is None
        else f"Repeated random tokens ({result.seq_len} in one copy{jitter})"
    )
    terms = {kind_title(kind): KIND_TERMS[kind] for kind in result.kinds if kind in KIND_TERMS}
    return Section(
        "Head scores",
        f"{source}, scored for each attention head. A head is named by layer and number, counted from 0: "
        "L3H1 is head 1 of layer 3.",
        parts,
        terms | {term: _TERMS[term] for term in ("Null", "Interval")},
    )


def attention_section(
    patterns: AttentionPatterns, *, title: str = "Attention patterns", text: str = ""
) -> Section:
    """The attention of chosen heads on one sequence, to explore.

    Args:
        text: what to look for in these patterns.
    """
    names = ", ".join(head_label(*head) for head in patterns.heads)
    caption = (
        f"Attention of {names}, from 0 (white) to 1 (dark); each row is a token that attends, each column a "
        "token attended to, with its position. Choose a head above, point at a cell for its numbers."
    )
    return Section(title, text, (Figure(plot_attention(patterns), caption),))


def _range(low: float, high: float) -> str:
    return f"{number(low)} to {number(high)}"
