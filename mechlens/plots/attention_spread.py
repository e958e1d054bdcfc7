"""The figure of attention spread."""

from __future__ import annotations

import plotly.graph_objects as go

from mechlens.arguments import check_type, names_of
from mechlens.plots.style import head_heatmap, titles
from mechlens.results import AttentionSpread


def plot_attention_spread(result: AttentionSpread, measure: str = "entropy") -> go.Figure:
    """Draw one measure of attention spread for every head, with layer 0 at the bottom.

    Args:
        measure: `entropy`, `distance` or `first`.

    Returns:
        A heatmap `[layer, head]`.

    Raises:
        TypeError: `result` is not an `AttentionSpread`.
        ValueError: there is no such measure.

    Example:
        >>> found = mechlens.attention_spread(model, "Mr. Pickwick met Mr. Winkle.")
        >>> mechlens.plot_attention_spread(found, "distance").data[0].z.shape
        (4, 6)
    """
    check_type("result", result, AttentionSpread)
    names_of("measure", measure, result.measures)
    values, column = result.of(measure), result.column(measure)
    figure = head_heatmap(
        values.double(),
        lambda layer, head: f"{column.heading}: {column.text(float(values[layer, head]))}",
        low=0.0,
        high=max(float(values.max()), 1e-6),
    )
    return figure.update_layout(title_text=titles(f"Attention: {column.heading}", result.model.name))
