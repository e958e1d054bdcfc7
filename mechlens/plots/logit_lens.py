"""Heatmaps of the logit lens: each layer's top guess at each position, colored by a statistic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import torch

from mechlens.arguments import check_type
from mechlens.plots.style import (
    ABSENT,
    HEIGHT,
    INK,
    NO_TICKS,
    TEMPLATE,
    WIDTH,
    figure_text,
    heatmap,
    titles,
    top_margin,
)
from mechlens.results import LogitLensResult
from mechlens.results.lens_statistics import LensStatistic, lens_statistic
from mechlens.text.color import is_dark, sequential
from mechlens.text.display import number, turns, visible_token

_LETTERS = (10, 8, 6)
"""Letters of a token before an ellipsis; the largest number that fits is used."""
_BESIDE = 168
"""Width of the layer labels and the color bar, in pixels."""


def plot_logit_lens(
    result: LogitLensResult,
    stat: str = "kl_final",
    *,
    row: int = 0,
    positions: Sequence[int] | None = None,
    high: float | None = None,
) -> go.Figure:
    """Draw the top guess of each layer at each position, colored by a statistic.

    Layer 0 is at the bottom. The tokens read are below the cells, with the role where a turn of a
    conversation begins. The tokens that follow are above, starred where the model's own guess is right. A
    guess is bold if it is the token that follows. Hover over a cell for the most likely tokens and the
    statistic. Padding is left out.

    Args:
        result: a lens from `logit_lens`, or two lenses `interleaved`.
        stat: `probability` (of each cell's own guess), `entropy`, `kl_final`, `kl_input`, or the rank or
            probability of a token: `rank_final` (the model's final guess), `rank_input`, `rank_next`, and for
            each target `rank_ Paris` and `probability_ Paris`. Ranks are colored on a log scale; undefined
            values are gray.
        row: sequence of the batch.
        positions: which of the positions that were read. None draws the last ones that fit into 1,100 pixels;
            the title says so if there are more.
        high: the value with the darkest color, in the statistic's unit; None is the largest value, or 1 for
            probabilities. nostalgebraist uses 100 for ranks of the final guess and 1000 for the input's.

    Returns:
        A plotly figure.

    Raises:
        ArgumentError: there is no such statistic, or `high` is out of range.
        ValueError: there is no such sequence or position, or the statistic is undefined for this model.

    Example:
        >>> lens = mechlens.logit_lens(model, "The captain of the", targets=" ship")
        >>> mechlens.plot_logit_lens(lens, "rank_ ship").data[0].z.shape
        (5, 6)

    References: nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    check_type("result", result, LogitLensResult)
    statistic = lens_statistic(result, stat)
    cells = _Cells.of(result, row, positions)
    values = statistic.values[:, row, cells.columns].double()
    bound = statistic.bound(values, high)
    grid: dict[str, Any] = {
        "x": list(range(len(cells.columns))),
        "y": list(range(len(result.rows))),
        "texttemplate": "%{text}",
        "textfont": {"size": cells.size, "color": INK},
        "hovers": _hovers(result, statistic, row, cells.columns),
        "xgap": 1,
        "ygap": 1,
    }
    texts = _marked(result, row, cells, statistic.shares(values, bound).tolist())
    top = math.log10(bound) if statistic.is_rank else bound
    figure = go.Figure(heatmap(statistic.scaled(values).numpy(), low=0.0, high=top, text=texts, **grid))
    cut = bool((values > bound).any())
    figure.data[0].colorbar.update(_color_bar(statistic, top, len(result.rows), cut=cut))
    undefined = values.isnan()
    if undefined.any():
        gray = torch.where(undefined, 1.0, torch.nan).numpy()
        # the other trace writes the text of the cells that have a value
        only = [
            [text if absent else "" for text, absent in zip(*line, strict=True)]
            for line in zip(texts, undefined.tolist(), strict=True)
        ]
        figure.add_trace(heatmap(gray, low=0.0, high=1.0, text=only, **grid))
        figure.data[-1].update(colorscale=[ABSENT, ABSENT], showscale=False)
    _lay_out(figure, result, statistic, row, cells)
    return figure


@dataclasses.dataclass(frozen=True)
class _Cells:
    """What is written into the cells, and how large."""

    columns: list[int]
    """The indices of those drawn on the axis `read`."""
    n_read: int
    """How many could be drawn."""
    guesses: list[list[str]]
    below: list[str]
    above: list[str]
    width: float
    """Of a column, in pixels."""
    height: int
    size: int
    """Of letters, in pixels."""

    @classmethod
    def of(cls, result: LogitLensResult, row: int, positions: Sequence[int] | None) -> _Cells:
        """As many letters of each token as fit, and, if `positions` is None, as many of the last columns."""
        columns = result.shown_columns(row, positions)
        n_read, n_rows = len(columns), len(result.rows)
        for longest in _LETTERS:
            size = 12 if longest > min(_LETTERS) else 11
            guesses, below, above = _texts(result, row, columns, longest)
            widest = max(map(len, [*below, *above, *(guess for line in guesses for guess in line)]))
            # letters are somewhat wider than half their height
            width = max(34, 10 + 0.58 * size * widest)
            if _BESIDE + width * len(columns) <= WIDTH:
                break
        if positions is None:
            columns = columns[-int((WIDTH - _BESIDE) / width) :]
            guesses, below, above = _texts(result, row, columns, longest)
        height = 34 if n_rows <= 16 else max(14, min(24, (HEIGHT - 220) // n_rows))
        # with a hundred rows of heads, letters are as small as can be read
        return cls(columns, n_read, guesses, below, above, width, height, min(size, round(0.65 * height)))


def _lay_out(
    figure: go.Figure, result: LogitLensResult, statistic: LensStatistic, row: int, cells: _Cells
) -> None:
    n_drawn, n_rows = len(cells.columns), len(result.rows)
    left_out = f"the last {n_drawn} of {cells.n_read} positions; positions= chooses others"
    title = titles(
        f"Logit lens{' by sublayer' if result.unit == 'sublayer' else ''}: "
        f"{statistic.title.removesuffix(', nats')}",
        " · ".join(result.facts),
        *([left_out] if n_drawn < cells.n_read else []),
        "cells: top guess, bold where it is what follows",
    )
    top_room = top_margin(title, 38)
    axis = {
        "tickvals": list(range(n_drawn)),
        "tickangle": 0,
        "tickfont": {"size": cells.size},
        "range": [-0.5, n_drawn - 0.5],
        **NO_TICKS,
    }
    # an axis is drawn only if something is on it
    figure.add_trace(
        go.Scatter(x=[0], y=[0], xaxis="x2", mode="markers", opacity=0, hoverinfo="skip", showlegend=False)
    )
    below = [figure_text(text) for text in cells.below]
    figure.update_layout(
        template=TEMPLATE,
        title_text=title,
        width=int(max(520, _BESIDE + cells.width * n_drawn)),
        height=top_room + 76 + cells.height * n_rows,
        margin={"t": top_room, "b": 62, "r": 16},
        xaxis={
            "title": {"text": "token read"},
            "ticktext": _with_turns(figure, result, row, cells.columns, below),
            **axis,
        },
        xaxis2={
            "title": {"text": "token that follows, * where the model's guess is right", "font": {"size": 12}},
            "overlaying": "x",
            "matches": "x",
            "side": "top",
            "ticktext": [figure_text(text) for text in cells.above],
            **axis,
        },
        yaxis={
            "title": {"text": result.unit},
            "tickvals": list(range(n_rows)),
            "ticktext": list(result.rows),
            "tickfont": {"size": cells.size},
            "range": [-0.5, n_rows - 0.5],
            "ticklabelstandoff": 4,
            **NO_TICKS,
        },
    )


def _with_turns(
    figure: go.Figure, result: LogitLensResult, row: int, columns: Sequence[int], labels: Sequence[str]
) -> list[str]:
    """The labels, with the role below and a line where a turn of a conversation begins."""
    begins, named = turns(result.texts(result.tokens[row])), list(labels)
    for at, column in enumerate(columns):
        place = result.positions[column]
        before = [start for start in begins if start <= place]
        # the first column names the role of its turn, wherever the turn began
        if before and (at == 0 or before[-1] == place):
            named[at] += f"<br><b>{begins[before[-1]]}</b>"
            if at:
                figure.add_vline(at - 0.5, line={"color": INK, "width": 1.5, "dash": "dot"})
    return named


def _texts(
    result: LogitLensResult, row: int, columns: Sequence[int], longest: int
) -> tuple[list[list[str]], list[str], list[str]]:
    """The texts in the cells, below them and above them."""
    read, follows = result.texts(result.tokens[row]), result.following(row)
    places = [result.positions[column] for column in columns]
    guesses = [
        [visible_token(text, longest=longest) for text in result.texts(ids)]
        for ids in result.top_ids[:, row, columns, 0]
    ]
    below = [visible_token(read[place], longest=longest) for place in places]
    above = []
    for column, place in zip(columns, places, strict=True):
        right = follows.get(place) == int(result.final_ids[row, column])
        shown = visible_token(read[place + 1], longest=longest) if place in follows else ""
        if right and len(shown) > longest:
            # the star takes up the room of a letter
            shown = visible_token(read[place + 1], longest=longest - 1)
        above.append(shown + "*" * right)
    return guesses, below, above


def _marked(
    result: LogitLensResult, row: int, cells: _Cells, shares: Sequence[Sequence[float]]
) -> list[list[str]]:
    """Each guess, bold if it is the token that follows, and light on a dark color."""
    follows = result.following(row)
    wanted = [follows.get(result.positions[column]) for column in cells.columns]
    ids = result.top_ids[:, row, cells.columns, 0].tolist()
    lines = []
    for at, line in enumerate(cells.guesses):
        marked = []
        for text, guess, follow, share in zip(line, ids[at], wanted, shares[at], strict=True):
            shown = figure_text(text)
            shown = f"<b>{shown}</b>" if guess == follow else shown
            light = share == share and is_dark(sequential(share))
            marked.append(f'<span style="color:#fff">{shown}</span>' if light else shown)
        lines.append(marked)
    return lines


def _hovers(
    result: LogitLensResult, stat: LensStatistic, row: int, columns: Sequence[int]
) -> list[list[str]]:
    read = [figure_text(visible_token(text)) for text in result.texts(result.tokens[row])]
    seen = result.mask[row].long().cumsum(0)
    heads = []
    for column in columns:
        position, context = result.positions[column], int(result.context_length[row, column])
        window = f" ({context} tokens seen)" if context != seen[position] else ""
        heads.append(f"after <b>{read[position]}</b>, position {position}{window}")
    lines = []
    for index, label in enumerate(result.rows):
        line = []
        for head, column in zip(heads, columns, strict=True):
            texts = result.texts(result.top_ids[index, row, column])
            probabilities = result.top_probabilities[index, row, column].tolist()
            guesses = "<br>".join(
                f"{number(probability)} {figure_text(visible_token(text))}"
                for text, probability in zip(texts, probabilities, strict=True)
            )
            value = stat.written(float(stat.values[index, row, column]))
            line.append(f"{head}<br>row {label}: {figure_text(stat.title)} {value}<br>{guesses}")
        lines.append(line)
    return lines


def _color_bar(stat: LensStatistic, top: float, n_rows: int, *, cut: bool) -> dict[str, Any]:
    """Ticks of the color bar; if values are cut, the last tick says so."""
    bar: dict[str, Any] = {
        "title": {"text": figure_text(stat.title), "side": "right", "font": {"size": 12}},
        "y": 1,
        "yanchor": "top",
    }
    if n_rows > 24:
        bar |= {"lenmode": "pixels", "len": 420}
    if not (stat.is_rank or cut):
        return bar | {"dtick": None, "nticks": 6}
    if stat.is_rank:
        # a tick that would touch the last one is left out
        ticks = [float(power) for power in range(math.ceil(top)) if power < top - 0.15] + [top]
        texts = [f"{10**tick:,.0f}" for tick in ticks]
    else:
        ticks = [top * quarter / 4 for quarter in range(5)]
        texts = [f"{tick:.3g}" for tick in ticks]
    if cut:
        texts[-1] = f"≥ {texts[-1]}"
    return bar | {"dtick": None, "tickmode": "array", "tickvals": ticks, "ticktext": texts}
