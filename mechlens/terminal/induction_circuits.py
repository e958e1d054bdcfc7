"""Induction circuits in a terminal: the table of evidence, and the reasons."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import typer

from mechlens.results import InductionCircuits
from mechlens.terminal.tables import print_table

_SHOWN = {
    "previous": "previous",
    "induction": "induction",
    "verdict": "verdict",
    "induction_score": "score",
    "k_score": "K-comp.",
    "k_rank": "rank",
    "k_top1_keys": "top-1 keys",
    "k_top1_queries": "queries",
    "ov_copying": "copying",
    "score_path": "score -keys",
    "score_removed": "-head",
    "loss_path": "loss -keys",
    "loss_removed": "-head",
}


def print_induction_circuits(found: InductionCircuits) -> None:
    """Print one line of evidence for each pair, and its reasons below."""
    if found.note:
        typer.echo(f"No induction circuit in {found.model.name}: {found.note}.")
        return
    rows = []
    for row in found.to_dataframe().to_dict("records"):
        cells = [row[name] for name in _SHOWN]
        rows.append([_cell(name, cell) for name, cell in zip(_SHOWN, cells, strict=True)])
    print_table(
        f"Induction circuits of {found.model.name}, {len(found.tokens)} x {found.seq_len} random tokens "
        "twice; -keys: without the previous-token head in the keys, -head: without it at all; loss "
        f"{found.clean_loss:.3f} and what it rises by, nats",
        tuple(_SHOWN.values()),
        rows,
    )
    for (previous, induction), why in zip(found.labels, found.reasons, strict=True):
        typer.echo(f"{previous} and {induction}: {why}.")


def _cell(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if name == "k_rank" else f"{value:.3f}"


def induction_circuits_json(found: InductionCircuits) -> dict[str, Any]:
    """All of the evidence."""
    return {
        "model": asdict(found.model),
        "seq_len": found.seq_len,
        "how": found.how,
        "clean_loss": found.clean_loss,
        "chance": found.chance,
        "relative_position": found.relative_position,
        "note": found.note,
        "pairs": found.to_dataframe().to_dict("records"),
    }
