"""Statistics of the logit lens by layer, as lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechlens.arguments import check_type
from mechlens.plots.style import BLUE, GREEN, PURPLE, TEMPLATE, VERMILION, WIDTH, figure_text, titles
from mechlens.results import LogitLensResult
from mechlens.results.lens_statistics import LensStatistic, check_statistics, lens_statistic
from mechlens.text.display import visible_token

_SYMBOLS = (
    *("circle", "square", "diamond", "triangle-up", "x", "star"),
    *("circle-open", "square-open", "diamond-open", "triangle-down-open", "cross-open", "hexagram-open"),
)
MAX_LINES = len(_SYMBOLS)
"""One marker for each line."""
_DASHES = ("solid", "dash", "dot", "dashdot")
_COLORS = (BLUE, VERMILION, GREEN, PURPLE)
_MARGIN = {"t": 104, "b": 56}


def plot_lens_lines(
    result: LogitLensResult,
    stats: str | Sequence[str] = ("rank_final", "kl_final"),
    *,
    row: int = 0,
    positions: Sequence[int] | None = None,
) -> go.Figure:
    """Draw statistics by layer: a line for each position, a panel for each statistic.

    Ranks are on a log axis. Each line has its own marker.

    Args:
        result: a lens from `logit_lens`, or two lenses `interleaved`.
        stats: one or several of `probability`, `entropy`, `kl_final`, `kl_input`, and the rank or probability
            of a token: `rank_final`, `rank_input`, `rank_next`, and for each target `rank_ Paris` and
            `probability_ Paris`.
        row: sequence of the batch.
        positions: at most 12 of the positions that were read; None draws the last 6.

    Returns:
        A plotly figure.

    Raises:
        ArgumentError: there is no such statistic, or too many positions.
        ValueError: there is no such sequence or position, or a statistic is undefined for this model.

    Example:
        >>> lens = mechlens.logit_lens(model, "The captain of the ship")
        >>> figure = mechlens.plot_lens_lines(lens, ["rank_next", "entropy"], positions=[2])
        >>> [trace.name for trace in figure.data]
        ['2 ·c', '2 ·c']
    """
    check_type("result", result, LogitLensResult)
    shown = [lens_statistic(result, stat) for stat in check_statistics(stats)]
    columns = result.shown_columns(row, positions)
    if positions is None:
        columns = columns[-6:]
    if len(columns) > MAX_LINES:
        raise ValueError(
            f"at most {MAX_LINES} lines can be distinguished, got {len(columns)}: choose some with positions="
        )
    read = result.texts(result.tokens[row])
    height = _height(len(shown))
    # labels between two panels need room
    apart = {1: 0, 2: 48}.get(len(shown), 84)
    figure = make_subplots(
        rows=len(shown), shared_xaxes=True, vertical_spacing=apart / (height - sum(_MARGIN.values()))
    )
    for line, column in enumerate(columns):
        position = result.positions[column]
        label = f"{position} {figure_text(visible_token(read[position], longest=16))}"
        look = {
            "line": {"color": _COLORS[line % 4], "dash": _DASHES[line // 4 % 4], "width": 2},
            "marker": {"symbol": _SYMBOLS[line], "size": 8, "color": _COLORS[line % 4]},
        }
        for at, each in enumerate(shown, start=1):
            values = each.values[:, row, column].tolist()
            hovers = [
                f"<b>{label}</b>, {name}<br>{figure_text(each.title)}: {each.written(value)}"
                for name, value in zip(result.rows, values, strict=True)
            ]
            trace = go.Scatter(
                x=list(range(len(result.rows))),
                y=[None if value != value else value for value in values],
                name=label,
                mode="lines+markers",
                cliponaxis=False,
                legendgroup=str(column),
                showlegend=at == 1,
                text=hovers,
                hoverinfo="text",
                **look,
            )
            figure.add_trace(trace, row=at, col=1)
    _lay_out(figure, result, shown, columns)
    return figure


def _height(n_panels: int) -> int:
    return 198 + (250 if n_panels <= 2 else 290) * n_panels


def _lay_out(
    figure: go.Figure, result: LogitLensResult, shown: Sequence[LensStatistic], columns: Sequence[int]
) -> None:
    n_rows = len(result.rows)
    title = " and ".join(each.title.removesuffix(", nats") for each in shown)
    if len(shown) > 2:
        # the titles would not fit, and each is on its own axis
        title = "logit lens"
    step = math.ceil(n_rows / 28)
    # the row embed, then layer 0 or the first whose label has room
    ticks = [0, *range(step, n_rows, step)] if step == 1 else [0, *range(1 + step, n_rows, step)]
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(f"{title[0].upper()}{title[1:]} by {result.unit}", " · ".join(result.facts)),
        width=min(WIDTH, 620 + 22 * n_rows),
        height=_height(len(shown)),
        margin=_MARGIN,
        legend={
            "orientation": "v",
            "x": 1.02,
            "y": 1,
            "yanchor": "top",
            "title": {"text": "position, token"},
            "itemwidth": 48,
        },
    )
    figure.update_xaxes(
        tickmode="array",
        tickvals=ticks,
        ticktext=[result.rows[at] for at in ticks],
        range=[-0.4, n_rows - 0.6],
        tickangle=-90 if result.unit == "head" else 0,
        showgrid=False,
    )
    for at in range(1, len(shown) + 1) if len(shown) > 2 else (len(shown),):
        figure.update_xaxes(title_text=result.unit, showticklabels=True, row=at, col=1)
    for at, each in enumerate(shown, start=1):
        values = each.values[..., list(columns)]
        axis: dict[str, Any] = {"title": {"text": each.title}}
        if each.is_rank:
            highest = math.log10(each.bound(values, None))
            axis |= {
                "type": "log",
                "dtick": 1,
                "range": [-0.08 * highest, 1.04 * highest],
                "tickformat": ",d",
            }
        else:
            axis |= {"rangemode": "tozero"}
        figure.update_yaxes(axis, row=at, col=1)
