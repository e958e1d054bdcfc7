"""The figure of a tuned lens: what its translators gain at each row."""

from __future__ import annotations

import plotly.graph_objects as go

from mechlens.arguments import check_type
from mechlens.plots.style import BLUE, TEMPLATE, VERMILION, WIDTH, figure_text, titles
from mechlens.results import TunedLens
from mechlens.text.display import number

_TICKS = [digit * 10.0**power for power in range(-6, 3) for digit in (1, 2, 5)]


def plot_tuned_lens(lens: TunedLens) -> go.Figure:
    """Draw how far each row's prediction is from the model's own, with and without its translator.

    The last layer is left out: it has no translator, and its distance of 0 has no place on a logarithmic
    axis.

    Args:
        lens: from `train_tuned_lens`.

    Returns:
        A plotly figure of KL(final || row) in nats, with traces `plain` and `tuned`.

    Raises:
        TypeError: the lens is not a `TunedLens`.
        ValueError: its KL was not measured, as in a published lens.

    Example:
        >>> text = mechlens.sample_tokens(model, batch=4, seq_len=16)
        >>> lens = mechlens.train_tuned_lens(model, text, training=mechlens.Training(1, 16), held_out=1)
        >>> [trace.name for trace in mechlens.plot_tuned_lens(lens).data]
        ['plain', 'tuned']
    """
    check_type("lens", lens, TunedLens)
    if not lens.is_measured:
        raise ValueError(
            f"this lens, {lens.source!r}, has no held-out KL to draw: only train_tuned_lens measures it"
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
            "Tuned lens: held-out KL(final || row)",
            lens.model.name,
            f"nats, mean over {lens.held_out_tokens:,} tokens; {lens.steps} steps",
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
