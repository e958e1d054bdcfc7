"""The figure of attention spread."""

from __future__ import annotations

import plotly.graph_objects as go

from mechlens.arguments import check_type, names_of
from mechlens.plots.style import TEMPLATE, heatmap, titles
from mechlens.results import AttentionSpread, head_label


def plot_attention_spread(result: AttentionSpread, measure: str = "entropy") -> go.Figure:
    """Draw one measure of attention spread for every head, layer 0 at the bottom.

    Args:
        measure: `entropy`, `distance` or `first`.

    Returns:
        A plotly heatmap.

    Raises:
        TypeError: not an `AttentionSpread`.
        ValueError: another measure.

    Example:
        >>> found = mechlens.attention_spread(model, "Mr. Pickwick met Mr. Winkle.")
        >>> mechlens.plot_attention_spread(found, "distance").data[0].z.shape
        (4, 6)
    """
    check_type("result", result, AttentionSpread)
    names_of("measure", measure, result.measures)
    values, column = result.of(measure), result.column(measure)
    n_layers, n_heads = values.shape
    hovers = [
        [
            f"<b>{head_label(layer, head)}</b><br>{column.heading}: {column.text(value)}"
            for head, value in each
        ]
        for layer, each in enumerate(map(enumerate, values.tolist()))
    ]
    figure = go.Figure(heatmap(values.numpy(), low=0, high=max(float(values.max()), 1e-6), hovers=hovers))
    return figure.update_layout(
        template=TEMPLATE,
        title_text=titles(f"Attention: {column.heading}", result.model.name),
        width=160 + 40 * n_heads,
        height=220 + max(20, 320 // n_layers) * n_layers,
        xaxis={"title": {"text": "head"}, "dtick": 1},
        yaxis={"title": {"text": "layer"}, "dtick": 1 if n_layers <= 16 else 4},
    )
