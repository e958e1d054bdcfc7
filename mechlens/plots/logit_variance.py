"""Figures of how the logits of probable and improbable tokens vary over layers."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechlens.arguments import check_type
from mechlens.plots.style import INK, MUTED, TEMPLATE, titles
from mechlens.results import LogitVariance
from mechlens.text.display import count, number

# blue to orange without the pale middle, which is hard to see on white; symbols differ as well
_COLORS = ["#08306b", "#2270b2", "#5aa2cf", "#dd8a3c", "#a85204", "#5c2c00"]
_APART = 0.16
"""Distance of the markers from the middle of a bar, so that the diamond does not cover the line."""
_PANELS = ("mean logit", "spread within the bin", "distance to the final logit", "variance over layers")
_SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "x", "star"]


def plot_logit_variance(result: LogitVariance) -> go.Figure:
    """Draw how logits vary over layers, for tokens binned by their final rank, as means over all positions.

    Lines by layer: the mean logit of each bin, the spread of its tokens' logits, and their distance from the
    final values. Bars: variance over layers. To the left of a bar's middle is the range of the random bins,
    to the right (diamond) the mean with tokens ranked at another position.

    Args:
        result: from `logit_variance`.

    Returns:
        A plotly figure of four panels, in logits and logits².

    Raises:
        TypeError: the result is not a `LogitVariance`.

    Example:
        >>> found = mechlens.logit_variance(model, "The captain of the", nulls=2)
        >>> mechlens.plot_logit_variance(found).layout.xaxis.title.text
        'layer'
    """
    check_type("result", result, LogitVariance)
    figure = make_subplots(
        rows=2, cols=2, horizontal_spacing=0.12, vertical_spacing=0.2, subplot_titles=_PANELS
    )
    for name, row, col in (("mean_logit", 1, 1), ("spread", 1, 2), ("excess", 2, 1)):
        figure.add_traces(_lines(result, name), rows=row, cols=col)
    figure.add_traces(_bars(result), rows=2, cols=2)
    _lay_out(figure, result)
    return figure


def _lines(result: LogitVariance, name: str) -> list[go.Scatter]:
    """A line for each bin of one statistic by layer."""
    labels, lines = result.labels, getattr(result, name).double().mean((2, 3))
    probability = result.probability.double().mean((1, 2)).tolist()
    found = []
    for index, label in enumerate(labels):
        if name == "spread" and result.bins[index][0] == result.bins[index][1]:
            continue  # one token has no spread
        color, symbol = _look(index, len(labels))
        found.append(
            go.Scatter(
                name=f"rank {label}",
                legendgroup=label,
                showlegend=name == "mean_logit",
                x=list(result.rows),
                y=lines[:, index].tolist(),
                mode="lines+markers",
                line={"color": color, "width": 2},
                marker={"symbol": symbol, "size": 7},
                hovertemplate=(
                    f"rank {label} (final probability {probability[index]:.1%} together)<br>"
                    "row %{x}: %{y:.3f}<extra></extra>"
                ),
            )
        )
    return found


def _bars(result: LogitVariance) -> list[go.Bar | go.Scatter]:
    """The variance of each bin, next to random bins and bins by rank at another position."""
    labels, places = list(result.labels), list(range(len(result.labels)))
    nulls = result.null_variance.double()
    null, low, high = (values.tolist() for values in (nulls.mean(0), nulls.amin(0), nulls.amax(0)))
    bars = go.Bar(
        name="variance",
        showlegend=False,
        x=places,
        y=result.variance.double().mean((1, 2)).tolist(),
        # pale, so that the markers in front of them can be seen
        marker={"color": [_look(index, len(labels))[0] for index in places], "opacity": 0.5},
        customdata=labels,
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
    if result.elsewhere_variance.isnan().all():
        return [bars, random]
    other = go.Scatter(
        name="rank at another position",
        x=[place + _APART for place in places],
        y=result.elsewhere_variance.double().mean((1, 2)).tolist(),
        mode="markers",
        marker={"symbol": "diamond", "size": 10, "color": "white", "line": {"width": 2, "color": INK}},
        hovertemplate="ranked at another position: %{y:.3f}<extra></extra>",
    )
    return [bars, random, other]


def _lay_out(figure: go.Figure, result: LogitVariance) -> None:
    found = result.estimates()
    n_positions = len(result.tokens) * len(result.positions)
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(
            "Do the logits of improbable tokens vary more over layers?",
            result.model.name,
            f"logits centered over the vocabulary, by final rank; mean of {count(n_positions, 'position')}",
            f"variance, least over most probable: {number(found['variance_ratio'], 2)}; in random bins "
            f"{number(found['null_ratio_low'], 2)} to {number(found['null_ratio_high'], 2)}, "
            f"ranked at another position {number(found['elsewhere_ratio'], 2)}",
        ),
        width=960,
        height=820,
        margin={"t": 150, "b": 110},
        legend={"y": -0.1, "yanchor": "top"},
        bargap=0.35,
    )
    # upright labels, as many as fit; `embed` needs the room of its neighbor
    step = 1 + (len(result.rows) - 1) // 12
    ticks = [0, *range(step if step == 1 else 1 + step, len(result.rows), step)]
    figure.update_xaxes(
        type="category",
        tickvals=ticks,
        ticktext=[result.rows[at] for at in ticks],
        tickangle=0,
        title={"text": "layer"},
        showgrid=False,
    )
    figure.update_xaxes(
        type=None,
        tickvals=list(range(len(result.labels))),
        ticktext=list(result.labels),
        tickangle=None,
        title={"text": "final rank"},
        row=2,
        col=2,
    )
    figure.update_yaxes(title={"text": "logits"})
    figure.update_yaxes(title={"text": "logits²"}, row=2, col=2)
    for row, col in ((1, 2), (2, 1), (2, 2)):
        figure.update_yaxes(rangemode="tozero", row=row, col=col)
    figure.update_annotations(font={"size": 13, "color": MUTED})


def _look(index: int, count: int) -> tuple[str, str]:
    """Color and symbol of a bin: the most probable dark blue, the least probable dark orange."""
    place = round(index * (len(_COLORS) - 1) / max(1, count - 1))
    return _COLORS[place], _SYMBOLS[index % len(_SYMBOLS)]
