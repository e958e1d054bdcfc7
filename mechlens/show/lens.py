"""The section on a logit lens, and on single vectors read through one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mechlens
from mechlens.errors import ArgumentError
from mechlens.results import LogitLensResult, VectorLens
from mechlens.results.lens_statistics import LensStatistic, check_statistics, lens_statistic
from mechlens.show.section import Cell, Figure, Section, Table, drawn, joined
from mechlens.text.display import visible_token

MAX_POSITIONS = 64
"""Maximum number of positions shown by default, counted from the end."""
STRETCH = 12
"""Positions per figure: as many as fit on a page. More positions make more figures."""
_LONGEST = 8
"""Maximum characters of a token in a terminal."""

_TERMS = {
    "Logit lens": (
        "What each layer would predict as the next token if it were the last: its output goes through the "
        "final norm and the unembedding."
    ),
    "Row embed": "The token and its position as they enter the first block, before any layer.",
    "Nat": "Unit of information with the natural logarithm: 0.69 nats are one bit.",
    "Rank": "Place of a token among all tokens of the vocabulary; 1 is the most likely.",
    "KL(final || layer)": (
        "Kullback-Leibler divergence of the model's own distribution from a layer's: 0 where they are equal."
    ),
    "KL(input || layer)": (
        "Kullback-Leibler divergence of the row embed's distribution, which is close to the input token, "
        "from a layer's; only where the unembedding is tied to the embedding."
    ),
    "Entropy": "How undecided a layer's distribution is: 0 where one token is certain.",
    "Probability of the top guess": "Probability that a layer gives to the token in its own cell.",
}
_OF_STATISTIC = {
    "probability": ("Probability of the top guess",),
    "entropy": ("Entropy", "Nat"),
    "kl_final": ("KL(final || layer)", "Nat"),
    "kl_input": ("KL(input || layer)", "Nat"),
}


def lens_section(
    result: LogitLensResult,
    stats: str | Sequence[str] = ("probability", "kl_final"),
    *,
    row: int = 0,
    positions: Sequence[int] | None = None,
    high: float | None = None,
    lines: Sequence[str] = ("rank_final", "kl_final"),
    title: str = "",
    text: str = "",
) -> Section:
    """Top guesses by layer and position, colored by each statistic, and statistics by layer as lines.

    A terminal shows the first statistic. Pages split more than 12 positions into figures with one scale.

    Args:
        stats: one or several of those that `plot_logit_lens` takes.
        row: sequence of the batch.
        positions: those to show, among those read; None shows the last 64, and says so if there are more.
        high: value with the darkest color, for a single statistic.
        lines: statistics drawn by layer at the last positions; empty for none.
        text: what to look for.

    Raises:
        ArgumentError: `high` is given for several statistics, or there is no such statistic.
    """
    stats = check_statistics(stats)
    if high is not None and len(stats) != 1:
        raise ArgumentError("high", "left out for several statistics", high)
    drawn, left_out = _shown(result, row, positions)
    parts: list[Figure | Table] = [_grid(result, stats[0], row, drawn, high)]
    if result.target_ids:
        parts.append(_targets(result, row, drawn[-1]))
    for stat in stats:
        parts += _heatmaps(result, stat, row, drawn, high)
    if lines:
        last = drawn[-6:]
        parts.append(
            Figure(
                lambda: mechlens.plot_lens_lines(result, lines, row=row, positions=last),
                f"The last {len(last)} positions, {result.unit} by {result.unit}.",
                f"{' and '.join(lines)} by {result.unit} after {', '.join(_read(result, row, last))}.",
            )
        )
    return Section(title or result.title, joined(text, left_out), parts, _terms(*stats, *lines))


def vector_section(
    result: VectorLens, *, top: int = 10, title: str = "Vectors read as predictions", text: str = ""
) -> Section:
    """The most likely tokens of each vector."""
    table = result.to_dataframe()
    shown = table[table["place"] <= top]
    return Section(title, text, (Table.of(shown, result.columns, "The most likely next tokens"),), _terms())


def _shown(result: LogitLensResult, row: int, positions: Sequence[int] | None) -> tuple[Sequence[int], str]:
    """The positions to show, and a paragraph on what is left out."""
    if positions is not None:
        return [result.positions[column] for column in result.shown_columns(row, positions)], ""
    every = result.shown_positions(row)
    if len(every) <= MAX_POSITIONS:
        return every, ""
    return every[-MAX_POSITIONS:], (
        f"Shown: the last {MAX_POSITIONS} of {len(every):,} positions. Choose others with positions=, or "
        "--position on the command line."
    )


def _scaled(
    result: LogitLensResult, stat: str, row: int, positions: Sequence[int], high: float | None
) -> tuple[LensStatistic, list[int], float]:
    """The statistic, the columns of the positions, and the value with the darkest color."""
    statistic = lens_statistic(result, stat)
    columns = result.shown_columns(row, positions)
    return statistic, columns, statistic.bound(statistic.values[:, row, columns], high)


def _grid(
    result: LogitLensResult, stat: str, row: int, positions: Sequence[int], high: float | None
) -> Table:
    """Top guesses on a colored background, for a terminal."""
    statistic, columns, bound = _scaled(result, stat, row, positions, high)
    read, follows = _read(result, row, range(result.tokens.shape[1]), _LONGEST), result.following(row)
    shares = statistic.shares(statistic.values[:, row, columns], bound).tolist()
    ids = result.top_ids[:, row, columns, 0]
    rows: list[list[Cell | str]] = []
    for at in reversed(range(len(result.rows))):
        line: list[Cell | str] = [result.rows[at]]
        texts = result.texts(ids[at])
        for text, token, position, share in zip(texts, ids[at].tolist(), positions, shares[at], strict=True):
            right = follows.get(position) == token
            line.append(Cell(visible_token(text, longest=_LONGEST) + "*" * right, share, right))
        rows.append(line)
    following = [read[position + 1] if position in follows else "" for position in positions]
    return Table(
        [result.unit, *(read[position] for position in positions)],
        [["next", *following], *rows],
        f"Top guess of each {result.unit} after each token, * where it is the next token",
        where="terminal",
        dense=True,
        shades=_scale(statistic, bound),
    )


def _scale(statistic: LensStatistic, bound: float) -> str:
    low = statistic.written(1.0) if statistic.is_rank else "0"
    return f"{statistic.title}, from {low} (light) to {statistic.written(bound)} (dark)"


def _targets(result: LogitLensResult, row: int, position: int) -> Table:
    """Rank and probability of each target after one position, by row."""
    column = result.positions.index(position)
    kinds = [
        kind
        for kind, needed in (("rank", "rank"), ("probability", "log_prob"))
        if needed in result.statistics
    ]
    names = [(name, kind) for name in result.target_ids for kind in kinds]
    rows = []
    for at in reversed(range(len(result.rows))):
        values = [
            float((result.rank[name] if kind == "rank" else result.probability(name))[at, row, column])
            for name, kind in names
        ]
        rows.append([result.rows[at], *values])
    (read,) = _read(result, row, [position])
    columns = [result.column(f"{kind}_{name}") for name, kind in names]
    return Table([result.unit, *columns], rows, f"Targets after {read}, position {position}", folded=True)


def _heatmaps(
    result: LogitLensResult, stat: str, row: int, positions: Sequence[int], high: float | None
) -> list[Figure]:
    """One statistic, in figures of at most `STRETCH` positions with the same colors."""
    statistic, _, bound = _scaled(result, stat, row, positions, high)
    count = math.ceil(len(positions) / STRETCH)
    # of about equal length, because a last one of two tokens would look lost
    length = math.ceil(len(positions) / count)
    parts = []
    for at in range(count):
        some = positions[at * length : (at + 1) * length]
        where = f", part {at + 1} of {count}" if count > 1 else ""
        parts.append(
            Figure(
                drawn("plot_logit_lens", result, stat, row=row, positions=some, high=bound),
                f"Top guess of each {result.unit} after each token{where}; the darker, the higher the "
                f"{statistic.title}. Hover over a cell for the most likely tokens.",
                f"Heatmap of top guesses by {result.unit} and position{where}, colored by the "
                f"{statistic.title}. Tokens read: {' '.join(_read(result, row, some))}",
                keeps_width=True,
            )
        )
    return parts


def _read(result: LogitLensResult, row: int, positions: Sequence[int], longest: int = 24) -> list[str]:
    texts = result.texts(result.tokens[row])
    return [visible_token(texts[position], longest=longest) for position in positions]


def _terms(*stats: str) -> dict[str, str]:
    used = {"Logit lens", "Row embed"}
    for stat in stats:
        used |= {"Rank"} if stat.startswith("rank_") else set(_OF_STATISTIC.get(stat, ()))
    return {term: text for term, text in _TERMS.items() if term in used}


SECTIONS = {LogitLensResult: lens_section, VectorLens: vector_section}
