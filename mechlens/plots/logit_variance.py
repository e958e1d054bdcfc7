"""Pictures of how the logits of probable and improbable tokens move over layers."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from mechlens.arguments import check_type
from mechlens.plots.style import INK, MUTED, TEMPLATE, titles
from mechlens.results import LogitVariance
from mechlens.text.display import number

# blue to orange without the pale middle, which white paper swallows; the symbol says the same
_COLOURS = ["#08306b", "#2270b2", "#5aa2cf", "#dd8a3c", "#a85204", "#5c2c00"]
_APART = 0.16
"""Of what stands before a bar from its middle, so that the diamond does not cover the line."""
_SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "x", "star"]


def plot_logit_variance(result: LogitVariance) -> go.Figure:
    """Draw how logits move over layers, for tokens binned by their final rank, as means over all positions.

    Lines, from `embed` to the last layer: the mean logit of each bin, the spread of its tokens' logits, and
    how far they are from their final values. Bars: their variance over layers, beside the range of the random
    assignments (line) and the mean where tokens are binned by their rank at another position (diamond), which
    stand to the left and right of a bar's middle.
    """
    check_type("result", result, LogitVariance)
    figure = make_subplots(
        rows=2,
        cols=2,
        horizontal_spacing=0.12,
        vertical_spacing=0.2,
        subplot_titles=(
            "mean logit",
            "spread within the bin",
            "distance to the final logit",
            "variance over layers",
        ),
    )
    panels = (("mean_logit", 1, 1), ("spread", 1, 2), ("excess", 2, 1))
    labels = result.labels
    probability = result.probability.double().mean((1, 2)).tolist()
    for name, row, col in panels:
        lines: Tensor = getattr(result, name).double().mean((2, 3))
        for index, label in enumerate(labels):
            if name == "spread" and result.bins[index][0] == result.bins[index][1]:
                continue  # one token has no spread
            colour, symbol = _look(index, len(labels))
            figure.add_trace(
                go.Scatter(
                    name=f"rank {label}",
                    legendgroup=label,
                    showlegend=name == "mean_logit",
                    x=list(result.rows),
                    y=lines[:, index].tolist(),
                    mode="lines+markers",
                    line={"color": colour, "width": 2},
                    marker={"symbol": symbol, "size": 7},
                    hovertemplate=(
                        f"rank {label} (finally {probability[index]:.1%} together)<br>row %{{x}}: %{{y:.3f}}"
                        "<extra></extra>"
                    ),
                ),
                row=row,
                col=col,
            )
    variance = result.variance.double().mean((1, 2)).tolist()
    nulls = result.null_variance.double()
    null, low, high = (values.tolist() for values in (nulls.mean(0), nulls.amin(0), nulls.amax(0)))
    elsewhere = result.elsewhere_variance.double().mean((1, 2)).tolist()
    places = list(range(len(labels)))
    bars = go.Bar(
        name="variance",
        showlegend=False,
        x=places,
        y=variance,
        # pale, so that what stands before them can be seen
        marker={
            "color": [_look(index, len(labels))[0] for index in range(len(labels))],
            "opacity": 0.5,
        },
        customdata=list(labels),
        hovertemplate="rank %{customdata}<br>variance %{y:.3f}<extra></extra>",
    )
    random = go.Scatter(
        name="random bins (lowest to highest draw)",
        x=[place - _APART for place in places],
        y=null,
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 16, "color": INK, "line": {"width": 2, "color": INK}},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [top - mean for top, mean in zip(high, null, strict=True)],
            "arrayminus": [mean - bottom for bottom, mean in zip(low, null, strict=True)],
            "color": INK,
            "thickness": 1.5,
            "width": 8,
        },
        customdata=list(zip(low, high, strict=True)),
        hovertemplate=(
            "random bins: %{y:.3f}<br>draws from %{customdata[0]:.3f} to %{customdata[1]:.3f}<extra></extra>"
        ),
    )
    figure.add_trace(bars, row=2, col=2)
    figure.add_trace(random, row=2, col=2)
    if not result.elsewhere_variance.isnan().all():
        other = go.Scatter(
            name="rank at another position",
            x=[place + _APART for place in places],
            y=elsewhere,
            mode="markers",
            marker={
                "symbol": "diamond",
                "size": 10,
                "color": "white",
                "line": {"width": 2, "color": INK},
            },
            hovertemplate="ranked at another position: %{y:.3f}<extra></extra>",
        )
        figure.add_trace(other, row=2, col=2)
    figures = result.figures()
    n_positions = len(result.tokens) * len(result.positions)
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(
            "Do the logits of improbable tokens wander?",
            result.model.name,
            f"logits less their mean over the vocabulary, by final rank; mean of {n_positions} positions",
            f"variance, least over most probable: {number(figures['variance_ratio'], 2)}; in random bins "
            f"{number(figures['null_ratio_low'], 2)} to {number(figures['null_ratio_high'], 2)}, "
            f"ranked elsewhere {number(figures['elsewhere_ratio'], 2)}",
        ),
        width=960,
        height=820,
        margin={"t": 150, "b": 110},
        legend={"y": -0.1, "yanchor": "top"},
        bargap=0.35,
    )
    # upright labels, as many as fit; `embed` needs the room of its neighbour
    step = 1 + (len(result.rows) - 1) // 12
    ticks = [0, *range(step if step == 1 else 1 + step, len(result.rows), step)]
    for panel in ("xaxis", "xaxis2", "xaxis3"):
        figure.layout[panel].update(
            type="category",
            tickvals=ticks,
            ticktext=[result.rows[at] for at in ticks],
            tickangle=0,
            title={"text": "layer"},
            showgrid=False,
        )
    figure.update_xaxes(
        tickvals=places,
        ticktext=list(labels),
        title={"text": "final rank"},
        showgrid=False,
        row=2,
        col=2,
    )
    figure.update_yaxes(title={"text": "logits"})
    figure.update_yaxes(title={"text": "logits²"}, rangemode="tozero", row=2, col=2)
    figure.update_yaxes(rangemode="tozero", row=1, col=2)
    figure.update_yaxes(rangemode="tozero", row=2, col=1)
    figure.update_annotations(font={"size": 13, "color": MUTED})
    return figure


def _look(index: int, count: int) -> tuple[str, str]:
    """Colour and symbol of a bin: the most probable dark blue, the least probable dark orange."""
    place = round(index * (len(_COLOURS) - 1) / max(1, count - 1))
    return _COLOURS[place], _SYMBOLS[index % len(_SYMBOLS)]
