"""Induction circuits in a terminal: the table of evidence, and the reasons."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mechlens.show.terminal import print_rows

if TYPE_CHECKING:
    from mechlens.results import InductionCircuits

_ATTENDS_AND_WEIGHS = {
    "previous": "previous",
    "induction": "induction",
    "induction_score": "score",
    "k_score": "K-comp.",
    "k_rank": "rank",
    "k_top1_keys": "top-1 keys",
    "k_top1_queries": "queries",
    "ov_copying": "copying",
}
_LOSES = {
    "previous": "previous",
    "induction": "induction",
    "score_path": "score -keys",
    "score_removed": "-head",
    "loss_path": "loss -keys",
    "loss_removed": "-head",
    "verdict": "verdict",
}


def print_induction_circuits(found: InductionCircuits) -> None:
    """Print the evidence for each pair, and its reasons below."""
    from mechlens.results.induction_circuits import VERDICT_RULE

    if found.note:
        print(f"No induction circuit in {found.model.name}: {found.note}.")
        return
    pairs = found.to_dataframe().to_dict("records")
    for title, shown in (
        (
            f"Induction circuits of {found.model.name}, {len(found.tokens)} x {found.seq_len} random tokens "
            "that come twice",
            _ATTENDS_AND_WEIGHS,
        ),
        (
            "Without the previous-token head in the keys alone (-keys), and without it at all (-head): the "
            f"induction score, and how the loss of {found.clean_loss:.3f} nats changes",
            _LOSES,
        ),
    ):
        rows = [[_cell(name, pair[name]) for name in shown] for pair in pairs]
        print_rows(title, tuple(shown.values()), rows)
    for (previous, induction), why in zip(found.labels, found.reasons, strict=True):
        print(f"{previous} and {induction}: {why}.")
    print(f"\n{found.counted} {VERDICT_RULE}")


def _cell(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return "undefined"
    if name.startswith("loss_"):
        return f"{value:+.3f}"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def induction_circuits_json(found: InductionCircuits) -> dict[str, Any]:
    """All of the evidence."""
    return {
        "model": asdict(found.model),
        "seq_len": found.seq_len,
        "how": found.how,
        "clean_loss": found.clean_loss,
        "chance": found.chance,
        "n_tokens": found.n_tokens,
        "confidence": found.confidence,
        "relative_position": found.relative_position,
        "note": found.note,
        "pairs": found.to_dataframe().to_dict("records"),
    }
