"""A report's section on induction circuits: a table of evidence in, a `Section` out."""

from __future__ import annotations

from mechlens.results import InductionCircuits
from mechlens.results.columns import Column
from mechlens.results.induction_circuits import VERDICT_RULE
from mechlens.show.section import Section, Table

_PAIR = {"previous": "previous token", "induction": "induction head"}
BEHAVIOUR_AND_WEIGHTS = {
    **_PAIR,
    "induction_score": "score",
    "k_score": "K-composition",
    "k_z": "over chance (sd)",
    "k_rank": "rank",
    "k_top1_keys": "top-1, keys",
    "k_top1_queries": "queries",
    "ov_copying": "OV copying",
}
CAUSE = {
    **_PAIR,
    "verdict": "verdict",
    "score_path": "score, not in keys",
    "score_removed": "not at all",
    "loss_path": "loss change, not in keys",
    "loss_removed": "not at all (nats)",
}
"""The evidence as a reader sees it, by column of `InductionCircuits.to_dataframe`; so short that no table is
wider than the page."""
_PLACES = {
    "mean": "its mean over other such sequences",
    "zero": "zeros",
    "resample": "what it gives on another such sequence",
}

_TERMS = {
    "Previous-token head": "A head whose attention goes to the token before.",
    "Induction head": (
        "A head that attends to the token after an earlier copy of the present one, and so foretells it."
    ),
    "K-composition": (
        "How much of what the later head compares its queries with could come from the earlier head, by the "
        "weights alone; over chance in standard deviations of the same score of random matrices."
    ),
    "Top-1 accuracy": (
        "How often a token matches itself best in the circuit of the two heads, over the whole vocabulary: "
        "for each query among keys, and for each key among queries."
    ),
    "OV copying": (
        "Whether the induction head raises the token that it attends to: the sum of its OV circuit's "
        "eigenvalues over the sum of their sizes, from -1 to 1."
    ),
    "Not in keys": (
        "The previous-token head is ablated only as the induction head's keys see it; all else is left."
    ),
    "Verdict": VERDICT_RULE,
}


def induction_circuits_section(
    result: InductionCircuits, *, title: str = "Induction circuits", text: str = ""
) -> Section:
    """The pairs as a table of evidence, each with the reasons for its verdict.

    Args:
        text: what to look for.
    """
    pairs = result.to_dataframe().to_dict("records")
    parts = [
        Table(
            [Column(name, title, digits=1 if name == "k_z" else 3) for name, title in columns.items()],
            [[_defined(row[name]) for name in columns] for row in pairs],
            caption,
        )
        for columns, caption in (
            (BEHAVIOUR_AND_WEIGHTS, "The induction score of each pair, and what its weights say"),
            (CAUSE, "The score and the loss without the previous-token head: in the keys alone, and at all"),
        )
        if pairs
    ]
    reasons = [
        f"{previous} and {induction}: {why}."
        for (previous, induction), why in zip(result.labels, result.reasons, strict=True)
    ]
    said = (
        f"{len(result.tokens)} sequences of {result.seq_len} random tokens that come twice. In the place of "
        f"an ablated head: {_PLACES[result.how]}. A token matches itself by chance once in "
        f"{1 / result.chance:.0f}."
        + (f" Without any ablation the second copy's loss is {result.clean_loss:.3f} nats." if pairs else "")
        + (f" {result.counted}" if pairs else "")
        + (f" No pair: {result.note}." if result.note else "")
    )
    return Section(title, "\n\n".join([*([text] if text else []), said, *reasons]), parts, _TERMS)


def _defined(value: str | float | int | None) -> str | float | int:
    """nan or None is what has no value: a score or a rank of a head that writes nothing."""
    return "undefined" if value is None or value != value else value
