"""The picture of a tuned lens: what its translators gain at each row."""

from __future__ import annotations

import plotly.graph_objects as go

from mechlens.arguments import check_type
from mechlens.plots.style import BLUE, TEMPLATE, VERMILION, WIDTH, figure_text, titles
from mechlens.results import TunedLens
from mechlens.text.display import number

_TICKS = [digit * 10.0**power for power in range(-6, 3) for digit in (1, 2, 5)]


def plot_tuned_lens(lens: TunedLens) -> go.Figure:
    """Draw how far each row's prediction is from the model's own, with and without its translator.

    The last layer has no translator; its distance is 0 but for rounding, and it is not drawn, because the
    axis is logarithmic.

    Returns:
        A figure of KL(final || row) in nats; traces `plain` and `tuned`.

    Raises:
        ValueError: nothing was measured, as in a lens read from a published checkpoint.
    """
    check_type("lens", lens, TunedLens)
    if lens.kl_tuned.isnan().all():
        raise ValueError(
            f"this lens has no held-out KL to draw (it is {lens.source!r}): only train_tuned_lens measures it"
        )
    rows = list(lens.rows)
    drawn = {"plain": lens.kl_plain.tolist()[: len(rows)], "tuned": lens.kl_tuned.tolist()[: len(rows)]}
    looks = {"plain": (VERMILION, "dash", "circle-open"), "tuned": (BLUE, "solid", "square")}
    figure = go.Figure(
        [
            go.Scatter(
                name=name,
                x=rows,
                y=[value if value > 0 else None for value in values],
                mode="lines+markers",
                line={"color": looks[name][0], "width": 2.5, "dash": looks[name][1]},
                marker={"symbol": looks[name][2], "size": 10, "line": {"width": 2}},
                hovertext=[
                    f"row {figure_text(row)}, {name}: {number(value)} nats"
                    for row, value in zip(rows, values, strict=True)
                ],
                hoverinfo="text",
            )
            for name, values in drawn.items()
        ]
    )
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(
            "Tuned lens: held-out KL(final ‖ row)",
            lens.model.name,
            f"nats, the mean of {lens.held_out_tokens:,} tokens; {lens.steps} steps",
        ),
        width=max(560, min(WIDTH, 160 + 44 * len(rows))),
        height=410,
        margin={"b": 84},
        legend={"y": -0.24},
        xaxis={"title": {"text": "row of the lens"}, "type": "category"},
        yaxis={
            "title": {"text": "KL (nats, log scale)"},
            "type": "log",
            # plotly writes only the first digit of the ticks between powers of ten
            "tickvals": _TICKS,
            "ticktext": [f"{tick:g}" for tick in _TICKS],
        },
    )
    return figure
