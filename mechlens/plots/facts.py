"""Facts by layer: how many can be read off the residual stream, and how sure of them it is."""

from __future__ import annotations

import plotly.graph_objects as go
from torch import Tensor

from mechlens.arguments import check_type
from mechlens.plots.style import BLUE, GREEN, MUTED, TEMPLATE, VERMILION, titles
from mechlens.results import Facts


def plot_facts(result: Facts) -> go.Figure:
    """Draw by layer the share of facts whose answer is the first guess, and among the first ten.

    Args:
        result: of `read_facts`.

    Returns:
        A figure with lines `first guess`, `among the first ten`, `mean probability` and, dotted, the shares
        of wrong answers of the same kind.
    """
    check_type("result", result, Facts)
    layers = ["emb.", *map(str, range(result.rank.shape[1] - 1))]

    def line(name: str, values: Tensor, colour: str, dash: str, symbol: str) -> go.Scatter:
        return go.Scatter(
            name=name,
            x=layers,
            y=values.tolist(),
            mode="lines+markers",
            line={"color": colour, "width": 2.5, "dash": dash},
            marker={"symbol": symbol, "size": 7},
            hovertemplate=f"layer %{{x}}, {name}: %{{y:.3f}}<extra></extra>",
        )

    figure = go.Figure(
        [
            line("among the first ten", result.share(10), BLUE, "dash", "square-open"),
            line("first guess", result.share(1), BLUE, "solid", "square"),
            line("mean probability", result.probability(), VERMILION, "solid", "circle"),
            line("wrong answer among the first ten", result.share(10, null=True), MUTED, "dot", "x"),
            line("wrong answer first", result.share(1, null=True), GREEN, "dot", "cross"),
        ]
    )
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(
            f"{len(result.prompts)} facts, read off each layer",
            f"{result.model.name}, {'with' if result.prepend_bos else 'without'} BOS",
        ),
        width=900,
        height=440,
        margin={"b": 110},
        legend={"y": -0.26},
        xaxis={"title": {"text": "after layer"}, "type": "category", "tickangle": 0},
        yaxis={"title": {"text": "share of facts, or probability"}, "range": [-0.02, 1.02]},
    )
    return figure
