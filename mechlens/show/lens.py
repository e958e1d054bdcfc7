"""A report's section on the logit lens: a result in, a `Section` out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import plotly.graph_objects as go

from mechlens.plots.logit_lens import (
    OF_TARGET,
    lens_stat,
    plot_lens_lines,
    plot_logit_lens,
    plot_sub_blocks,
    shown_positions,
    stacked,
)
from mechlens.results import LogitLensResult
from mechlens.show.section import Figure, Section
from mechlens.text.display import visible_token

MAX_POSITIONS = 64
"""As many as are drawn unasked."""
STRETCH = 12
"""Positions beside one another in a page, as many as its column holds; a longer text is drawn in several
pictures."""

_TERMS = {
    "Logit lens": (
        "What a layer's vectors say about the next token, read as if the layer were the model's last: "
        "through the last norm and the unembedding."
    ),
    "Row embed": "The token and its position as they enter the first block, before any layer.",
    "Nat": "Unit of information with the natural logarithm: 0.69 nats are one bit.",
    "Rank": "Place of a token among all tokens of the vocabulary; 1 is the most likely.",
    "KL(final ‖ layer)": (
        "Kullback-Leibler divergence of a layer's distribution from the model's own: 0 where they are the "
        "same."
    ),
    "KL(input ‖ layer)": (
        "Kullback-Leibler divergence of a layer's distribution from that of the row embed, which is close to "
        "the input token; only where the unembedding is tied to the embedding."
    ),
    "Entropy": "How undecided a layer's distribution is: 0 where one token is certain.",
    "Probability of the top guess": "Probability that a layer gives to the token in its own cell.",
}
_OF_STAT = {
    "probability": ("Probability of the top guess",),
    "rank": ("Rank",),
    "kl": ("KL(final ‖ layer)", "Nat"),
    "kl_input": ("KL(input ‖ layer)", "Nat"),
    "input_rank": ("Rank",),
    "next_rank": ("Rank",),
    "entropy": ("Entropy", "Nat"),
}


def lens_section(
    result: LogitLensResult,
    stats: str | Sequence[str] = ("probability", "kl"),
    *,
    row: int = 0,
    positions: Sequence[int] | None = None,
    target: str | None = None,
    high: float | None = None,
    lines: Sequence[str] = ("rank", "kl"),
    title: str = "Logit lens",
    text: str = "",
) -> Section:
    """Top guesses by layer and position, coloured by each statistic, and statistics by layer as lines.

    More than 12 positions are drawn in stretches with the same colours.

    Args:
        stats: one or several of those that `plot_logit_lens` takes.
        row: which sequence of the batch.
        positions: which of the positions that were read; None draws the last 64, and says so where there are
            more.
        target: whose `rank` and `probability`, as for `plot_logit_lens`.
        high: the value that gets the darkest colour, for one statistic.
        lines: statistics of the last of the positions, drawn by layer; none leaves the lines out.
        text: what to look for.

    Raises:
        ValueError: `high` for several statistics, and as `plot_logit_lens`.
    """
    stats = (stats,) if isinstance(stats, str) else tuple(stats)
    named = "head" if result.component == "result" else "layer"
    positions, left_out = _shown(result, row, positions)
    parts = _heatmaps(
        partial(plot_logit_lens, result, row=row), result, stats, row, positions, target, high, named
    )
    if lines:
        last = positions[-6:]
        read = ", ".join(_read(result, row, last))
        parts.append(
            Figure(
                plot_lens_lines(result, lines, row=row, positions=last, target=_for(target, lines)),
                f"The last {len(last)} positions, {named} by {named}.",
                f"Lines of {' and '.join(lines)} by {named} after {read}.",
            )
        )
    return Section(title, text + left_out, parts, _terms(*stats, *lines))


def sub_blocks_section(
    attn: LogitLensResult,
    mlp: LogitLensResult,
    stats: str | Sequence[str] = "kl",
    *,
    row: int = 0,
    positions: Sequence[int] | None = None,
    target: str | None = None,
    high: float | None = None,
    title: str = "Logit lens by sub-block",
    text: str = "",
) -> Section:
    """Two lenses as one, each layer's MLP above its attention; all else is as in `lens_section`.

    Raises:
        ValueError: as `plot_sub_blocks`.
    """
    stats = (stats,) if isinstance(stats, str) else tuple(stats)
    positions, left_out = _shown(attn, row, positions)
    draw = partial(plot_sub_blocks, attn, mlp, row=row)
    parts = _heatmaps(draw, stacked(attn, mlp), stats, row, positions, target, high, "sub-block")
    return Section(title, text + left_out, parts, _terms(*stats))


def _shown(result: LogitLensResult, row: int, positions: Sequence[int] | None) -> tuple[Sequence[int], str]:
    """The positions to draw, and a paragraph on what is left out."""
    if positions is not None:
        return list(positions), ""
    every = shown_positions(result, row)
    if len(every) <= MAX_POSITIONS:
        return every, ""
    return every[-MAX_POSITIONS:], (
        f"\n\nShown: the last {MAX_POSITIONS} of {len(every):,} positions. Others are chosen by positions=, "
        "on the command line by --position."
    )


def _heatmaps(
    draw: Callable[..., go.Figure],
    result: LogitLensResult,
    stats: Sequence[str],
    row: int,
    positions: Sequence[int],
    target: str | None,
    high: float | None,
    named: str,
) -> list[Figure]:
    if high is not None and len(stats) != 1:
        raise ValueError(f"high is of one statistic, but there are {', '.join(stats)}")
    count = max(1, math.ceil(len(positions) / STRETCH))
    # of about the same length, because a last one of two tokens would look lost
    length = math.ceil(len(positions) / count)
    stretches = [positions[at : at + length] for at in range(0, len(positions), length)] if length else [[]]
    of_target = _for(target, stats)
    parts = []
    for stat in stats:
        of = of_target if stat in OF_TARGET else None
        shown = lens_stat(result, stat, of)
        columns = [result.positions.index(position % result.tokens.shape[1]) for position in positions]
        whole = shown.bound(shown.values[:, row, columns], high)
        for at, stretch in enumerate(stretches, start=1):
            where = f", part {at} of {len(stretches)}" if len(stretches) > 1 else ""
            parts.append(
                Figure(
                    draw(stat, positions=stretch, target=of, high=whole),
                    f"Each {named}'s top guess after each token{where}; the darker, the higher the "
                    f"{shown.title}. Point at a cell for the most likely tokens.",
                    f"Heatmap of top guesses by {named} and position{where}, coloured by the {shown.title}. "
                    f"Tokens read: {' '.join(_read(result, row, stretch))}",
                    keeps_width=True,
                )
            )
    return parts


def _for(target: str | None, stats: Sequence[str]) -> str | None:
    """The target, where one of these statistics is of one."""
    return target if any(stat in OF_TARGET for stat in stats) else None


def _read(result: LogitLensResult, row: int, positions: Sequence[int]) -> list[str]:
    texts = result.texts(result.tokens[row])
    return [visible_token(texts[position], longest=24) for position in positions]


def _terms(*stats: str) -> dict[str, str]:
    used = {"Logit lens", "Row embed", *(term for stat in stats for term in _OF_STAT[stat])}
    return {term: text for term, text in _TERMS.items() if term in used}
