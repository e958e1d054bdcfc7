"""The figure of patches by role."""

from __future__ import annotations

import plotly.graph_objects as go

from mechlens.arguments import check_type
from mechlens.errors import ArgumentError
from mechlens.plots.style import NO_TICKS, TEMPLATE, figure_text, heatmap, titles, top_margin
from mechlens.results import RoleGrid
from mechlens.text.display import count, number

VALUES = ("effect", "recovered")


def plot_role_grid(result: RoleGrid, *, value: str = "recovered") -> go.Figure:
    """Draw what a patch at each layer and role does to the logit difference, with layer 0 at the bottom.

    Blue raises the logit difference, orange lowers it. Hover for numbers with their standard error.

    Args:
        value: `recovered`, the share of the way to the other run, or `effect`, in logits.

    Returns:
        A heatmap `[layer, role]`.

    Raises:
        TypeError: `result` is not a `RoleGrid`.
        ArgumentError: `value` is unknown.

    Example:
        >>> found = mechlens.load_task("agreement", model, n=4).grid("resid_pre")
        >>> mechlens.plot_role_grid(found).data[0].z.shape
        (4, 3)
    """
    check_type("result", result, RoleGrid)
    if value not in VALUES:
        raise ArgumentError("value", f"one of {', '.join(VALUES)}", value)
    values = (result.recovered if value == "recovered" else result.effect).double()
    high = max(float(values.abs().nan_to_num(0).max()), 1.0 if value == "recovered" else 1e-6)
    hovers = [
        [
            f"<b>layer {layer}, {figure_text(role)}</b>"
            f"<br>change {number(float(result.effect[row, column]))} logits"
            f"<br>standard error {number(float(result.standard_error[row, column]))}"
            f"<br>recovered {number(float(result.recovered[row, column]))}"
            for column, role in enumerate(result.roles)
        ]
        for row, layer in enumerate(result.layers)
    ]
    texts = [[number(each, 2) for each in row] for row in values.tolist()]
    drawn = heatmap(values.numpy(), low=-high, high=high, hovers=hovers, name=value, xgap=1, ygap=1)
    drawn.update(text=texts, texttemplate="%{text}", y=[*result.layers], x=[*map(figure_text, result.roles)])
    drawn.colorbar.update(tickformat=".3~g")
    title = titles(
        f"Share of the way to the {'clean' if result.into == 'corrupted' else 'corrupted'} run"
        if value == "recovered"
        else "Change in the logit difference (logits)",
        f"{result.model.name}, task {result.task}, {count(len(result.prompts), 'prompt')}",
        f"{result.site} patched with: {result.source}; into the {result.into} run",
        *([result.note] if result.note else []),
    )
    return go.Figure(drawn).update_layout(
        template=TEMPLATE,
        title_text=title,
        width=max(520, 170 + 90 * len(result.roles)),
        height=top_margin(title) + 70 + 22 * max(len(result.layers), 6),
        margin={"t": top_margin(title)},
        xaxis={"title": {"text": "role"}, "type": "category", **NO_TICKS},
        yaxis={"title": {"text": "layer"}, "type": "category", **NO_TICKS},
    )
