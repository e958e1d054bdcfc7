"""Sections on circuits, composition, and attention by position."""

from __future__ import annotations

from functools import partial

import mechlens
from mechlens.results import Circuit, CircuitSummary, CompositionScores, PositionalAttention
from mechlens.results.columns import Column
from mechlens.show.section import Figure, Section, Table, joined
from mechlens.text.display import number, visible_token

_EIGENVALUES = "Sum of the eigenvalues over the sum of their magnitudes, from -1 to 1: 1 where every token "
_QK = {
    "QK circuit": (
        "How much a query token prefers to attend to a key token in a head, for all pairs of tokens: a "
        "product of weights, before the attention scale and without biases."
    ),
    "Matching score": f"{_EIGENVALUES}matches itself.",
}
_OV = {
    "OV circuit": (
        "What a head adds to the logit of each possible next token (destination) when it attends to a source "
        "token: a product of weights, without biases and without normalization."
    ),
    "Copying score": f"{_EIGENVALUES}raises itself.",
}
_TOP_K = {
    "Top-k accuracy": (
        "How often a token's entry with itself is among the k largest of its row, or of its column."
    )
}
_COMPOSITION = {
    "Composition": (
        "How much of a later head's input could come from an earlier head's output, judging by weights "
        "alone: the norm of the product of both heads' circuits over the product of their norms, from 0 to "
        "1. Q, K and V are the later head's query, key and value."
    ),
    "Baseline": "The same score for heads of these sizes with random weights.",
}
_LONGEST = 16
"""Maximum characters of a token in a table."""


def circuit_section(result: Circuit, *, title: str = "", text: str = "") -> Section:
    """The eigenvalues of a square circuit, and what a `CircuitSummary` has: a part, accuracies, entries."""
    square = result.shape[0] == result.shape[1]
    said = [f"{result.shape[0]:,} x {result.shape[1]:,}, {' by '.join(result.axes)}."]
    if result.embedding == "effective":
        said.append("The embedding is the effective one.")
    if result.rotation:
        said.append(f"Rotation: {result.rotation}.")
    parts: list[Figure | Table] = []
    if isinstance(result, CircuitSummary):
        parts += [_part(result), _part_table(result)]
    if square:
        score = result.copying_score()
        written = number(score) if score == score else "undefined"
        said.append(f"{result.score_name.capitalize()} {written}.")
        parts.append(
            Figure(
                partial(_eigenvalues, result),
                "The eigenvalues in the complex plane; the radius is the logarithm of their magnitude. Those "
                f"on the right mean {'matching' if result.score_name == 'matching score' else 'copying'}.",
                f"Eigenvalues of the {result.name}: {result.score_name} {written}.",
                wide=False,
            )
        )
    if isinstance(result, CircuitSummary):
        parts += [_accuracies(result), _pairs(result)]
    terms = _QK if result.axes == ("query", "key") else _OV
    return Section(
        title or result.title,
        joined(text, " ".join(said)),
        parts,
        terms | (_TOP_K if isinstance(result, CircuitSummary) else {}),
    )


def _eigenvalues(result: Circuit) -> object:
    return mechlens.plot_eigenvalues(result)


def _part(result: CircuitSummary) -> Figure:
    n, (one, other) = len(result.shown), result.axes
    return Figure(
        lambda: mechlens.plot_circuit_corner(result.corner_table(), result),
        f"Part of the circuit, {one} down and {other} across. Blue on the diagonal: the token "
        f"{'matches' if one == 'query' else 'copies'} itself.",
        f"Entries of {n} x {n} tokens of the {result.name}.",
        # a small one shares a row with the eigenvalues
        keeps_width=n > 12,
        wide=n > 12,
    )


def _part_table(result: CircuitSummary) -> Table:
    table, (one, other) = result.corner_table(), result.axes
    names = [visible_token(str(label), longest=_LONGEST) for label in table.index]
    rows = [[name, *line] for name, line in zip(names, table.to_numpy().tolist(), strict=True)]
    columns = [Column("token", one), *(Column(name, name, digits=2) for name in names)]
    return Table(columns, rows, f"Part of the circuit: {one} down, {other} across", where="terminal")


def _accuracies(result: CircuitSummary) -> Table:
    one, other = result.axes
    rows = [
        (f"{axis} for each {fixed}", *result.accuracy_of(axis).values())
        for axis, fixed in ((other, one), (one, other))
    ]
    # as a decimal it would round to 0.0000
    chance = ("by chance", *(f"{k} in {result.shape[1]:,}" for k in result.ks))
    columns = [Column("axis", "the token itself is among the largest")]
    columns += [Column(f"top {k}", digits=4) for k in result.ks]
    return Table(columns, [*rows, chance], "Top-k accuracy over the whole vocabulary")


def _pairs(result: CircuitSummary) -> Table:
    rows = [
        (*(visible_token(row[axis], longest=_LONGEST) for axis in result.axes), row["value"])
        for row in result.to_dataframe().to_dict("records")
    ]
    columns = (*result.axes, result.column("value"))
    return Table(columns, rows, f"The {len(rows)} largest entries", folded=len(rows) > 15)


def composition_section(
    result: CompositionScores, *, top: int = 20, title: str = "", text: str = ""
) -> Section:
    """All pairs of heads as a heatmap, and the strongest as a graph and a table.

    Args:
        top: number of pairs to draw as edges and to list; pairs not above the baseline are left out.

    Raises:
        ArgumentError: `top` is below 1.
    """
    best = result.summary(top)
    first = best[:3].to_dict("records")
    highest = "; ".join(f"{row['earlier']} with {row['later']}, {number(row['score'])}" for row in first)
    highest = f"Highest: {highest or 'none above the baseline'}."
    said = [
        f"Random weights of these sizes score {number(result.baseline_mean, 4)} with a standard deviation of "
        f"{number(result.baseline_std, 4)}, over {result.baseline_draws} draws.",
        f"Rotation: {result.rotation}." if result.rotation else "",
    ]
    return Section(
        title or result.title,
        joined(text, " ".join(filter(None, said))),
        (
            Figure(
                lambda: mechlens.plot_composition_scores(result),
                "Score of each pair minus the baseline: blue is above random weights; gray pairs are not in "
                "an earlier and a later layer. Hover for the heads.",
                f"{result.title}, all pairs. {highest}",
                keeps_width=True,
            ),
            Figure(
                lambda: mechlens.plot_head_graph(result, top=top),
                f"The {len(best)} pairs with the highest scores, layer 0 at the bottom: wider and darker "
                "edges are further above the baseline.",
                f"Graph of the {len(best)} strongest pairs. {highest}",
                keeps_width=True,
            ),
            Table.of(best, result.columns, f"The {len(best)} strongest pairs", folded=True),
        ),
        _COMPOSITION,
    )


def positional_section(result: PositionalAttention, *, title: str = "", text: str = "") -> Section:
    """The pattern as a figure."""
    return Section(
        title or result.title,
        text,
        (
            Figure(
                lambda: mechlens.plot_positional_attention(result),
                "Each row is a query position; gray positions are in its future.",
                result.title,
                wide=False,
            ),
        ),
    )


SECTIONS = {
    Circuit: circuit_section,
    CircuitSummary: circuit_section,
    CompositionScores: composition_section,
    PositionalAttention: positional_section,
}
