"""Circuits in a terminal: what they hold and which heads compose, as tables, or all of it for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mechlens.show.terminal import print_rows

if TYPE_CHECKING:
    import pandas as pd

    from mechlens.results import Circuit, CompositionScores

_LONGEST = 16


def print_circuit(
    circuit: Circuit,
    accuracy: Mapping[str, Mapping[int, float]],
    copying_score: float,
    pairs: pd.DataFrame,
    corner: pd.DataFrame,
    note: str = "",
) -> None:
    """Print how often a token finds itself in a circuit, its largest pairs of tokens, and a part of it.

    Args:
        accuracy: for each axis that is searched, the top-k accuracy by k; undefined of a zero circuit.
        pairs: of `largest_pairs`.
        corner: of `circuit_corner`.
    """
    from mechlens.plots.circuits import eigenvalue_score_name, rotation_words
    from mechlens.text.display import visible_token

    rotation = rotation_words(circuit)
    embedding = "" if circuit.embedding == "W_E" else f", {circuit.embedding} embedding"
    n_rows, n_columns = circuit.shape
    ks = list(next(iter(accuracy.values()), {}))
    one, other = circuit.axes
    searched = {one: f"{one} of each {other}", other: f"{other} of each {one}"}
    rows = [
        (searched[axis], *("undefined" if circuit.is_zero else f"{shares[k]:.4f}" for k in ks))
        for axis, shares in accuracy.items()
    ]
    print_rows(
        f"{circuit.name[0].upper()}{circuit.name[1:]} of {circuit.model.name}, {n_rows:,} x {n_columns:,} "
        f"tokens{embedding}{f'; {rotation}' if rotation else ''}",
        ("the token itself is among the largest", *(f"top {k}" for k in ks)),
        [*rows, ("by chance", *(f"{k} in {n_columns:,}" for k in ks))],
    )
    score = f"{copying_score:.3f}" if copying_score == copying_score else "undefined"
    print(f"{eigenvalue_score_name(circuit).capitalize()} of its eigenvalues (-1 to 1): {score}")
    print_rows(
        f"The {len(pairs)} largest entries",
        (one, other, "entry"),
        [
            (*(visible_token(row[axis], longest=_LONGEST) for axis in circuit.axes), f"{row['value']:.3f}")
            for row in pairs.to_dict("records")
        ],
    )
    print_rows(
        f"A part of it: {one} down, {other} across",
        ("", *(visible_token(str(label), longest=_LONGEST) for label in corner.columns)),
        [
            (visible_token(str(label), longest=_LONGEST), *(f"{value:.2f}" for value in values))
            for label, values in zip(corner.index, corner.to_numpy().tolist(), strict=True)
        ],
    )
    if note:
        print(f"Note: {note}")


def circuit_json(
    circuit: Circuit,
    accuracy: Mapping[str, Mapping[int, float]],
    copying_score: float,
    pairs: pd.DataFrame,
    corner: pd.DataFrame,
    note: str = "",
) -> dict[str, Any]:
    """The same as `print_circuit` shows. An accuracy is by the axis that is searched and by k; nan of a zero
    circuit."""
    return {
        "model": asdict(circuit.model),
        "name": circuit.name,
        "heads": [list(head) for head in circuit.heads],
        "axes": list(circuit.axes),
        "shape": list(circuit.shape),
        "embedding": circuit.embedding,
        "rotary": circuit.rotary,
        "relative_position": circuit.relative_position,
        "accuracy": {
            axis: {f"top_{k}": math.nan if circuit.is_zero else share for k, share in shares.items()}
            for axis, shares in accuracy.items()
        },
        "copying_score": copying_score,
        "pairs": pairs.to_dict("records"),
        "corner": {
            circuit.axes[0]: list(corner.index),
            circuit.axes[1]: list(corner.columns),
            "entries": corner.to_numpy().tolist(),
        },
        "note": note,
    }


def print_composition(found: CompositionScores, top: int) -> None:
    """Print the pairs of heads with the highest scores, over the baseline."""
    from mechlens.plots.circuits import rotation_words

    rotation = rotation_words(found)
    print_rows(
        f"{found.kind.upper()}-composition of {found.model.name}; random weights give "
        f"{found.baseline_mean:.4f} with a standard deviation of {found.baseline_std:.4f}"
        f"{f'; {rotation}' if rotation else ''}",
        ("earlier", "later", "score", "over baseline", "standard deviations"),
        [
            (
                row["earlier"],
                row["later"],
                f"{row['score']:.3f}",
                f"{row['over_baseline']:+.3f}",
                f"{row['z']:+.1f}",
            )
            for row in found.to_dataframe().head(top).to_dict("records")
        ],
    )


def composition_json(found: CompositionScores) -> dict[str, Any]:
    """What the scores are of, and every pair, the highest score first."""
    return {
        "model": asdict(found.model),
        "kind": found.kind,
        "baseline_mean": found.baseline_mean,
        "baseline_std": found.baseline_std,
        "baseline_draws": found.baseline_draws,
        "seed": found.seed,
        "rotary": found.rotary,
        "relative_position": found.relative_position,
        "pairs": found.to_dataframe().to_dict("records"),
    }
