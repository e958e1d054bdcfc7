"""The section on induction circuits: two tables of evidence, and the reasons for each verdict."""

from __future__ import annotations

from mechlens.results import InductionCircuits
from mechlens.results.induction_circuits import VERDICT_RULE
from mechlens.show.section import Section, Table
from mechlens.text.display import count, number

_TABLES = {
    "Behavior and weights: the induction score, and the evidence from the weights of both heads": (
        *("previous", "induction", "induction_score", "k_score", "k_z", "k_rank", "k_top1_keys"),
        *("k_top1_queries", "ov_copying"),
    ),
    "Cause: ablating the previous-token head in the induction head's keys only, or everywhere": (
        *("previous", "induction", "verdict", "score_path", "score_removed", "loss_path", "loss_removed"),
    ),
}
"""Columns by caption, few enough for each table to fit the page."""
_REPLACED = {
    "mean": "its mean over other such sequences",
    "zero": "zeros",
    "resample": "its output on another such sequence",
}
_TERMS = {
    "Previous-token head": "A head that attends to the previous token.",
    "Induction head": (
        "A head that attends to the token after an earlier copy of the current one, and predicts it."
    ),
    "K-composition": (
        "How much of the later head's keys could come from the earlier head, judging by weights alone. Above "
        "chance: in standard deviations of random weights."
    ),
    "Top-1 accuracy": (
        "How often a token matches itself best in the circuit of the two heads, over the whole vocabulary: "
        "among all keys for each query, and among all queries for each key."
    ),
    "OV copying": (
        "Whether the induction head raises the logit of the token it attends to: the sum of its OV circuit's "
        "eigenvalues over the sum of their magnitudes, from -1 to 1."
    ),
    "Keys, head": "The previous-token head is ablated only in the induction head's keys, or everywhere.",
    "Verdict": VERDICT_RULE,
}


def induction_circuits_section(
    result: InductionCircuits, *, title: str = "Induction circuits", text: str = ""
) -> Section:
    """The pairs as tables of evidence, each with the reasons for its verdict."""
    frame = result.to_dataframe()
    tables = [
        Table.of(frame, [result.column(name) for name in names], caption)
        for caption, names in _TABLES.items()
        if result.pairs
    ]
    reasons = [
        f"{previous} and {induction}: {why}."
        for (previous, induction), why in zip(result.labels, result.reasons, strict=True)
    ]
    sequences = count(len(result.tokens), "sequence")
    said = [f"Measured on {sequences} of {result.seq_len} random tokens, each repeated once."]
    if result.pairs:
        said += [
            f"An ablated head's output is replaced by {_REPLACED[result.how]}.",
            f"Without ablation, the loss on the second copy is {number(result.clean_loss)} nats.",
            f"By chance one token in {1 / result.chance:,.0f} matches itself.",
            result.counted,
        ]
    else:
        said.append(f"No pair was found: {result.note}.")
    parts = filter(None, (text, " ".join(said), *reasons, VERDICT_RULE if reasons else ""))
    return Section(title, "\n\n".join(parts), tables, _TERMS)


SECTIONS = {InductionCircuits: induction_circuits_section}
