"""Facts by layer: how many the logit lens shows, and with what probability."""

from __future__ import annotations

import plotly.graph_objects as go
from torch import Tensor

from mechlens.arguments import check_type
from mechlens.plots.style import BLUE, GREEN, MUTED, TEMPLATE, VERMILION, titles
from mechlens.results import Facts
from mechlens.text.display import count


def plot_facts(result: Facts) -> go.Figure:
    """Draw the share of facts whose answer is the top-1 prediction or in the top 10, by layer.

    Args:
        result: from `read_facts`.

    Returns:
        A figure with the lines `top-1`, `top 10`, `mean probability` and, dotted, two for wrong answers.

    Example:
        >>> facts = [("verb", "The captain of the", " ship"), ("verb", "He went to the", " door")]
        >>> figure = mechlens.plot_facts(mechlens.read_facts(model, facts))
        >>> [line.name for line in figure.data[:3]]
        ['top 10', 'top-1', 'mean probability']
    """
    check_type("result", result, Facts)
    layers = ["emb.", *map(str, range(result.rank.shape[1] - 1))]

    def line(name: str, values: Tensor, color: str, dash: str, symbol: str) -> go.Scatter:
        return go.Scatter(
            name=name,
            x=layers,
            y=values.tolist(),
            mode="lines+markers",
            line={"color": color, "width": 2.5, "dash": dash},
            marker={"symbol": symbol, "size": 7},
            hovertemplate=f"layer %{{x}}, {name}: %{{y:.3f}}<extra></extra>",
        )

    figure = go.Figure(
        [
            line("top 10", result.share(10), BLUE, "dash", "square-open"),
            line("top-1", result.share(1), BLUE, "solid", "square"),
            line("mean probability", result.probability(), VERMILION, "solid", "circle"),
            line("wrong answer, top 10", result.share(10, null=True), MUTED, "dot", "x"),
            line("wrong answer, top-1", result.share(1, null=True), GREEN, "dot", "cross"),
        ]
    )
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(
            f"{count(len(result.prompts), 'fact')} by layer",
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
