"""A report's sections on circuits and composition: results in, `Section`s out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mechlens.measures.weights import eigenvalue_copying_score
from mechlens.plots.circuits import (
    eigenvalue_score_name,
    plot_circuit_corner,
    plot_composition_scores,
    plot_eigenvalues,
    plot_head_graph,
    rotation_words,
    strongest_pairs,
)
from mechlens.results import Circuit, CompositionScores
from mechlens.show.section import Figure, Section, Table
from mechlens.text.display import number, visible_token

if TYPE_CHECKING:
    import pandas as pd

_EIGENVALUES = "Sum of the eigenvalues over the sum of their magnitudes, -1 to 1: 1 where every token "
_QK = {
    "QK circuit": (
        "How much a head at a query wants to attend to a key, for all pairs of tokens: a product of weights, "
        "before the attention scale and without the biases."
    ),
    "Matching score": f"{_EIGENVALUES}matches itself.",
}
_OV = {
    "OV circuit": (
        "What a head that attends to a source adds to the logit of each destination, a token that may come "
        "next: a product of weights, without the biases and the norms' division."
    ),
    "Copying score": f"{_EIGENVALUES}raises itself.",
}
_TERMS = {
    "Top-k accuracy": (
        "How often the entry of a token with itself is among the k largest, where one axis is fixed and the "
        "other searched."
    ),
}
_COMPOSITION = {
    "Composition": (
        "How much of what a later head reads could come from what an earlier one writes, by their weights "
        "alone: the norm of the product of both over the product of their norms, 0 to 1. Q, K and V are the "
        "later head's query, key and value."
    ),
    "Baseline": "The same score of heads of these sizes with random weights; scores say something above it.",
}


def circuit_section(
    circuit: Circuit,
    *,
    accuracy: Mapping[str, Mapping[int, float]] | None = None,
    pairs: pd.DataFrame | None = None,
    corner: pd.DataFrame | None = None,
    title: str | None = None,
    text: str = "",
) -> Section:
    """A circuit's eigenvalues, what part of it and which of its largest entries are given, and accuracies.

    Args:
        circuit: eigenvalues are drawn of a square one.
        accuracy: `top_k_accuracy` by k, for each axis that is searched; undefined of a circuit that is zero.
        pairs: of `largest_pairs`.
        corner: of `circuit_corner`.
        title: None is the circuit's name.
        text: what to look for.

    Cost: eigenvalues of a matrix of the inner dimension.
    """
    parts: list[Figure | Table] = []
    said = [f"{circuit.shape[0]:,} x {circuit.shape[1]:,}, {' by '.join(circuit.axes)}."]
    if circuit.embedding not in ("W_E", "none"):
        said.append(f"Tokens come in by the {circuit.embedding} embedding.")
    if rotation_words(circuit):
        said.append(f"In it: {rotation_words(circuit)}.")
    if corner is not None:
        one, other = circuit.axes
        parts.append(
            Figure(
                plot_circuit_corner(corner, circuit),
                f"A part of the circuit, {one} down and {other} across. Where a token meets itself in blue, "
                "it looks for itself or copies itself.",
                f"Entries of {len(corner)} x {len(corner.columns)} tokens of the {circuit.name}.",
                # a small one shares a row with the eigenvalues
                keeps_width=len(corner.columns) > 12,
                wide=len(corner.columns) > 12,
            )
        )
    if circuit.shape[0] == circuit.shape[1]:
        score = "undefined" if circuit.is_zero else number(eigenvalue_copying_score(circuit))
        score_name = eigenvalue_score_name(circuit)
        said.append(f"{score_name.capitalize()} {score}.")
        parts.append(
            Figure(
                plot_eigenvalues(circuit),
                "The eigenvalues in the complex plane; the radius is the logarithm of their magnitude. "
                f"Those to the right {'match' if score_name == 'matching score' else 'copy'}.",
                f"Eigenvalues of the {circuit.name}: {score_name} {score}.",
                wide=False,
            )
        )
    if accuracy:
        ks = list(next(iter(accuracy.values())))
        one, other = circuit.axes
        searched = {one: f"{one} of each {other}", other: f"{other} of each {one}"}
        shown: list[tuple[str | float, ...]] = [
            (searched[axis], *("undefined" if circuit.is_zero else shares[k] for k in ks))
            for axis, shares in accuracy.items()
        ]
        # a share of a large vocabulary is 0.000
        chance = ("by chance", *(f"{k} in {circuit.shape[1]:,}" for k in ks))
        parts.append(
            Table(
                ("the token itself is among the largest", *(f"top {k}" for k in ks)),
                [*shown, chance],
                "Top-k accuracy over the whole vocabulary",
            )
        )
    if pairs is not None:
        rows = [
            (*(visible_token(row[axis]) for axis in circuit.axes), row["value"])
            for row in pairs.to_dict("records")
        ]
        parts.append(
            Table((*circuit.axes, "entry"), rows, f"The {len(rows)} largest entries", folded=len(rows) > 15)
        )
    name = f"{circuit.name[0].upper()}{circuit.name[1:]}"
    return Section(
        name if title is None else title,
        "\n\n".join(each for each in (text, " ".join(said)) if each),
        parts,
        (_QK if circuit.axes == ("query", "key") else _OV) | _TERMS,
    )


def composition_section(
    result: CompositionScores, *, top: int = 20, title: str | None = None, text: str = ""
) -> Section:
    """All pairs of heads as a heatmap, the strongest as a graph and as a table.

    Args:
        top: how many pairs are drawn as edges and listed; those that are not above the baseline are left out.
        title: None says which composition.
        text: what to look for.

    Raises:
        ValueError: `top` is below 1, or the model has one layer.
    """
    best = strongest_pairs(result, top).to_dict("records")
    kind = f"{result.kind.upper()}-composition"
    named = "; ".join(f"{row['earlier']} with {row['later']}, {number(row['score'])}" for row in best[:3])
    columns = {"earlier": "earlier", "later": "later", "score": "score", "over baseline": "over_baseline"}
    columns |= {"standard deviations": "z"}
    said = (
        f"Random weights of these sizes score {number(result.baseline_mean)} with a standard deviation of "
        f"{number(result.baseline_std, 4)}, over {result.baseline_draws} draws."
    )
    if rotation_words(result):
        said += f" In the scores: {rotation_words(result)}."
    parts: list[Figure | Table] = [
        Figure(
            plot_composition_scores(result),
            "Score of each pair less the baseline's: blue is more than random weights give, grey is no pair "
            "of an earlier and a later layer. Point at a cell for its heads.",
            f"{kind} of all pairs of heads. Highest: {named or 'none above the baseline'}.",
            keeps_width=True,
        ),
        Figure(
            plot_head_graph(result, top=top),
            f"The {len(best)} pairs with the highest scores, layer 0 at the bottom: wider and darker edges "
            "are further above the baseline.",
            f"Graph of the {len(best)} strongest pairs. Highest: {named or 'none above the baseline'}.",
            keeps_width=True,
        ),
        Table(
            tuple(columns),
            [tuple(row[name] for name in columns.values()) for row in best],
            f"The {len(best)} strongest pairs as a table",
            folded=True,
        ),
    ]
    return Section(
        f"{kind} of heads" if title is None else title,
        "\n\n".join(each for each in (text, said) if each),
        parts,
        _COMPOSITION,
    )
