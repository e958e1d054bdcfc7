"""What all figures share: colors, the template, heatmaps and titles."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.results.heads import head_label
from mechlens.text.color import SEQUENTIAL

# Okabe and Ito's colors, which people with any common color blindness can distinguish. Figures never rely
# on hue alone: shape, dash or position shows the same, so they survive a black-and-white printer.
BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
INK = "#1f2933"
MUTED = "#5b6770"
GRID = "#e4e7eb"
ABSENT = "#c9ced4"

# Like the sequential scale, it darkens with the magnitude. The negative end stays lighter than the positive
# one, so the sign can be seen in grayscale.
DIVERGING = ["#a85204", "#dd8a3c", "#f8cf9f", "#f7f7f7", "#9fc8e3", "#2270b2", "#08306b"]

WIDTH = 1100
"""The largest default width of a figure in pixels: the width of a page."""
HEIGHT = 1400
"""The largest default height of a figure of 30 layers, in pixels."""

HEADS = 40
"""Rows of a figure with a row for each head."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_AXIS = {
    "gridcolor": GRID,
    "linecolor": MUTED,
    "tickcolor": MUTED,
    "ticks": "outside",
    "ticklen": 4,
    "zeroline": False,
    "automargin": True,
    "title": {"standoff": 10, "font": {"size": 13}},
}

NO_TICKS = {"ticks": "", "showgrid": False, "ticklabelstandoff": 4}
"""An axis of cells, whose labels need no tick marks."""

_BUTTONS = ["zoom2d", "pan2d", "select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"]
_BUTTONS += ["sendChartToCloud", "sendDataToCloud"]

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": [BLUE, VERMILION, GREEN, PURPLE],
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "margin": {"l": 56, "r": 16, "t": 100, "b": 52},
        "title": {
            "x": 0,
            "xanchor": "left",
            "xref": "container",
            # plotly measures it from the middle of the first of several lines
            "pad": {"l": 2, "t": 20},
            "y": 1,
            "yanchor": "top",
            "yref": "container",
            "font": {"size": 15},
        },
        # In a row the buttons would cover the title, and all of plotly's would cover the color bar. A mouse
        # zooms without them, and no button may send a chart anywhere.
        "modebar": {"orientation": "v", "remove": _BUTTONS},
        "hoverlabel": {"bgcolor": "white", "bordercolor": MUTED, "font": {"family": FONT, "color": INK}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"},
    }
)


def figure_text(text: str) -> str:
    """Escape a text for plotly, which interprets tags, entities and formulas in every text."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def heatmap(values: Any, *, low: float, high: float, hovers: list[list[str]], **options: Any) -> go.Heatmap:
    """A heatmap from `low` to `high`, with colors that diverge around 0 if `low` is negative.

    Args:
        hovers: the escaped hover text of each cell; cells without a value show none.
        options: further properties of the trace.
    """
    ticks = {"tickvals": [low, 0, high]} if low < 0 else {"dtick": (high - low) / 4}
    return go.Heatmap(
        z=values,
        zmin=low,
        zmax=high,
        colorscale=DIVERGING if low < 0 else SEQUENTIAL,
        hovertext=hovers,
        hoverinfo="text",
        hoverongaps=False,
        colorbar={"thickness": 12, "outlinewidth": 0, "ticks": "", **ticks},
        **options,
    )


def head_heatmap(
    values: Float[Tensor, "layer head"],
    hover: Callable[[int, int], str],
    *,
    low: float,
    high: float,
    **options: Any,
) -> go.Figure:
    """A heatmap of one value per head, with layer 0 at the bottom; heads without a value are gray.

    Args:
        hover: the hover text of (layer, head), shown after the head's name.
        options: further properties of the trace.
    """
    n_layers, n_heads = values.shape
    heads = [[(layer, head) for head in range(n_heads)] for layer in range(n_layers)]
    hovers = [[f"<b>{head_label(*head)}</b><br>{hover(*head)}" for head in row] for row in heads]
    shared: dict[str, Any] = {"hovers": hovers, "xgap": 1, "ygap": 1}
    figure = go.Figure(heatmap(values.numpy(), low=low, high=high, **shared, **options))
    if values.isnan().any():
        gray = torch.where(values.isnan(), 1.0, torch.nan).numpy()
        figure.add_trace(heatmap(gray, low=0.0, high=1.0, name="no score", **shared))
        figure.data[-1].update(colorscale=[ABSENT, ABSENT], showscale=False)
    return figure.update_layout(
        template=TEMPLATE,
        width=min(WIDTH, 150 + n_heads * (56 if n_heads <= 12 else 28)),
        height=160 + n_layers * (56 if n_layers <= 4 else 34 if n_layers <= 12 else 16),
        xaxis={"title": {"text": "head"}, "dtick": _step(n_heads), **NO_TICKS},
        yaxis={"title": {"text": "layer"}, "dtick": _step(n_layers), **NO_TICKS},
    )


def strongest_heads(effect: Float[Tensor, "_ _"]) -> tuple[list[int], str]:
    """The rows of the heads with the largest effects, either way, in order of layers; and how many they are
    in words, if not all."""
    largest = effect.abs().nan_to_num(0).amax(1)
    rows = sorted(largest.argsort(descending=True, stable=True)[:HEADS].tolist())
    some = f"the {len(rows)} of {len(effect)} heads with the largest effects"
    return rows, some if len(rows) < len(effect) else ""


def _step(count: int) -> int:
    """The step between axis labels that keeps them apart on a phone."""
    return 1 if count <= 16 else 2 if count <= 32 else 4


def top_margin(title: str, more: int = 0) -> int:
    """Height in pixels of a title from `titles`, with room for plotly's three buttons at the right.

    Args:
        more: height of what is between the title and the plot, such as ticks.
    """
    return max(100, 46 + round(19.5 * title.count("<br>")) + more)


def titles(title: str, *subtitles: str) -> str:
    """A figure's title with smaller lines below it; the texts are escaped here."""
    lines = [f"<b>{figure_text(title)}</b>"]
    lines += [
        f'<span style="font-size:12px;color:{MUTED}">{figure_text(subtitle)}</span>' for subtitle in subtitles
    ]
    return "<br>".join(lines)
