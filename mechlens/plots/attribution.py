"""Figures of direct logit attribution: which components raise a token's logit and which lower it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechlens.arguments import check_counts, check_type
from mechlens.plots.style import BLUE, INK, MUTED, NO_TICKS, TEMPLATE, VERMILION, WIDTH, heatmap, titles
from mechlens.results import LogitAttribution, component_place
from mechlens.text.display import number


def plot_attribution(
    result: LogitAttribution, *, row: int = 0, position: int = -1, largest: int = 12
) -> go.Figure:
    """Draw what each component adds to the logit at one position: a heatmap, and bars for the largest.

    Blue raises the logit, orange lowers it. The heatmap is by layer and head, with layer 0 at the bottom and
    columns for the attention bias and the MLP beside the heads. The bars include the embeddings and the final
    bias, and sum to the logit.

    Args:
        row: which sequence of the batch; negative counts from the end.
        position: which of the positions that were read; negative counts from the end.
        largest: how many layer components get a bar.

    Returns:
        A plotly figure.

    Raises:
        TypeError: the result is not a `LogitAttribution`.
        ArgumentError: there is no such sequence or position, or `largest` is below 1.

    Example:
        >>> found = mechlens.direct_logit_attribution(model, "The captain of the")
        >>> mechlens.plot_attribution(found).layout.xaxis.title.text
        'head'
    """
    check_type("result", result, LogitAttribution)
    check_counts(largest=largest)
    values = result.parts(row=row, position=position)
    n_layers, n_heads = result.model.n_layers, result.model.n_heads
    has_mlp = "L0 MLP" in values
    # an empty column separates the heads from the bias and the MLP
    columns = [*(f"H{head}" for head in range(n_heads)), "", " bias", *([" MLP"] if has_mlp else [])]
    names = [[f"L{layer}{column}" if column else "" for column in columns] for layer in range(n_layers)]
    cells = [[values.get(name, math.nan) for name in line] for line in names]
    high = max(1e-6, *(abs(v) for name, v in values.items() if component_place(name)[0] is not None))
    digits = 2 if n_heads <= 8 else 1
    # a cell without a component stays empty; more than 16 heads leave no room
    written = [
        [_written(value, digits) if n_heads <= 16 and value == value else "" for value in line]
        for line in cells
    ]

    bars = result.largest(largest, row=row, position=position)
    figure = make_subplots(
        cols=2,
        column_widths=[0.62, 0.38],
        horizontal_spacing=0.2,
        subplot_titles=("by layer", "largest, embeddings and final bias"),
    )
    figure.add_trace(
        heatmap(
            cells,
            low=-high,
            high=high,
            hovers=[
                [f"<b>{name}</b><br>adds {number(values.get(name, math.nan))}" for name in line]
                for line in names
            ],
            name="by layer",
            text=written,
            texttemplate="%{text}",
            textfont={"size": 12 if n_heads <= 8 else 10},
            xgap=1,
            ygap=1,
        ),
        col=1,
        row=1,
    )
    figure.data[0].colorbar.update(x=0.5, xanchor="left", tickformat=".3~g", len=1.05)
    figure.add_trace(_bars(bars), col=2, row=1)
    step = 1 if n_heads <= 16 else 2 if n_heads <= 32 else 4
    ticks = [at for at in range(len(columns)) if at > n_heads or (at < n_heads and at % step == 0)]
    labels = [str(at) if at < n_heads else columns[at].strip() for at in ticks]
    # room for the numbers beyond the bars' ends
    low_end, high_end = min(0.0, *bars.values()), max(0.0, *bars.values())
    room = 0.28 * max(high_end - low_end, 1e-6)
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(*result.describe(row=row, position=position)),
        width=min(WIDTH, 560 + len(columns) * (52 if n_heads <= 8 else 40 if n_heads <= 16 else 20)),
        height=max(
            200 + n_layers * (46 if n_layers <= 6 else 30 if n_layers <= 24 else 16), 190 + 21 * len(bars)
        ),
        margin={"t": 128},
        showlegend=False,
        bargap=0.3,
        xaxis={"title": {"text": "head"}, "tickvals": ticks, "ticktext": labels, "tickangle": 0, **NO_TICKS},
        yaxis={"title": {"text": "layer"}, "dtick": 1 if n_layers <= 16 else 4, **NO_TICKS},
        xaxis2={
            "title": {"text": "added to the logit"},
            "range": [low_end - (room if low_end < 0 else 0), high_end + (room if high_end > 0 else 0)],
            "zeroline": True,
            "zerolinecolor": MUTED,
        },
        yaxis2={"type": "category", "autorange": "reversed", "showgrid": False, "ticks": ""},
    )
    figure.update_annotations(font={"size": 13, "color": MUTED})
    return figure


def _bars(bars: Mapping[str, float]) -> go.Bar:
    """The largest components, each with its number."""
    return go.Bar(
        name="largest",
        orientation="h",
        x=list(bars.values()),
        y=list(bars),
        marker={"color": [BLUE if value >= 0 else VERMILION for value in bars.values()]},
        text=[_written(value, 2) for value in bars.values()],
        textposition="outside",
        textfont={"color": INK},
        cliponaxis=False,
        hovertext=[f"<b>{name}</b><br>adds {number(value)}" for name, value in bars.items()],
        hoverinfo="text",
    )


def _written(value: float, digits: int) -> str:
    """A number with one more digit if it would round to 0, and without a sign if it still does."""
    digits += abs(value) < 0.5 * 10**-digits
    return number(value if abs(value) >= 0.5 * 10**-digits else 0.0, digits)
