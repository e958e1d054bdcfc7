"""The figure of the input probe: how well the input token is recovered, and with what kind of map."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechlens.arguments import check_type
from mechlens.plots.style import ABSENT, BLUE, GREEN, INK, MUTED, TEMPLATE, VERMILION, figure_text, titles
from mechlens.results import InputProbe
from mechlens.text.display import number

_BASES = {
    "embedding": ("embedding", BLUE, "circle"),
    "pca": ("PCA of W_E", VERMILION, "square"),
    "nmf": ("NMF of W_E", GREEN, "triangle-up"),
}
_KINDS = {"per_layer": ("map of the row", "solid", ""), "shared": ("shared map", "dash", "-open")}
_PANELS = (
    "Held-out token accuracy",
    "Weight against importance (rank correlation)",
    "Similarity to W_E (cosine)",
    "Similarity to W_U (cosine)",
)
_COMPARED = {"weight_correlation": (1, 2), "similarity": (2, 1), "unembedding_similarity": (2, 2)}
_APART = 0.18
"""Distance between the markers of two bases, so that none hides another."""


def plot_input_probe(result: InputProbe) -> go.Figure:
    """Draw how many tokens are recovered at each row, and how each map compares with random maps.

    The color and shape of a marker show the basis. In the accuracy panel, filled markers on solid lines are
    the maps of single rows, and open markers on dashed lines the shared map; the dotted line always guesses
    the most frequent token. In the other panels, the shared map comes last, and gray bars are the central 95%
    of random maps with the same singular values.

    Args:
        result: from `probe_input`.

    Returns:
        A plotly figure of four panels; traces have names such as `accuracy pca shared`.

    Raises:
        TypeError: the result is not an `InputProbe`.

    Example:
        >>> text = mechlens.sample_tokens(model, batch=32, seq_len=16)
        >>> options = {"bases": (), "train_tokens": 300, "held_out_tokens": 50, "null_draws": 2}
        >>> figure = mechlens.plot_input_probe(mechlens.probe_input(model, text, **options))
        >>> figure.layout.annotations[0].text
        'Held-out token accuracy'
    """
    check_type("result", result, InputProbe)
    figure = make_subplots(
        rows=2, cols=2, subplot_titles=[figure_text(panel) for panel in _PANELS], vertical_spacing=0.2
    )
    middle = (len(result.accuracy) - 1) / 2
    shifts = {basis: _APART * (place - middle) for place, basis in enumerate(result.accuracy)}
    for measure, panel in _COMPARED.items():
        # bars first, so that none covers a marker
        for add in (_add_null, _add_compared):
            for basis, shift in shifts.items():
                add(figure, result, basis, measure, panel, shift)
    for basis, shift in shifts.items():
        _add_accuracy(figure, result, basis, shift)
    _add_legend(figure, result)
    ends = [-0.5, len(result.rows) - 0.5]
    figure.add_trace(
        go.Scatter(
            name="most frequent token",
            x=ends,
            y=[result.chance] * 2,
            mode="lines",
            line={"color": MUTED, "width": 1.5, "dash": "dot"},
            hovertemplate=f"most frequent token: {number(result.chance)}<extra></extra>",
        ),
        row=1,
        col=1,
    )
    for at, labels in (((1, 1), result.rows), *((panel, result.fits) for panel in _COMPARED.values())):
        step = 1 + (len(labels) - 1) // 10
        shown = [
            index
            for index, label in enumerate(labels)
            # `shared`, at the end, needs the room of its neighbor
            if label == "shared" or (index % step == 0 and (step == 1 or "shared" not in labels[index:][:3]))
        ]
        figure.update_xaxes(
            row=at[0],
            col=at[1],
            tickvals=shown,
            ticktext=[figure_text(labels[index]) for index in shown],
            range=[-0.5, len(labels) - 0.5],
            showgrid=False,
            tickangle=0,
            title_text="row of the stream" if at == (1, 1) else "map",
        )
    figure.update_yaxes(row=1, col=1, range=[-0.04, 1.04])
    figure.update_yaxes(row=1, col=2, range=[-1.06, 1.06])
    for at in _COMPARED.values():
        figure.add_hline(0, row=at[0], col=at[1], line={"color": MUTED, "width": 1}, layer="below")
    figure.update_annotations(font_size=13)
    own, shared = result.accuracy["embedding"][0], result.accuracy["embedding"][-1]
    read = f"{number(float(own[0]))} at the embedding, {number(float(own[-1]))} after the last layer"
    if len(result.maps) == 1:
        read = f"{number(float(shared.mean()))} on average by the shared map"
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(
            "The input token, recovered from the residual stream",
            f"{result.model.name}; tokens recovered: {read}",
            f"linear maps fitted to {result.train_tokens:,} positions, tested on {result.held_out_tokens:,}",
        ),
        width=980,
        height=760,
        margin={"t": 130, "b": 110},
        legend={"y": -0.1, "tracegroupgap": 0},
    )
    return figure


def _size(result: InputProbe) -> float:
    """Size of markers and bars in pixels; smaller in deep models, so that they do not touch."""
    return max(4.5, min(9.0, 100 / len(result.rows)))


def _add_legend(figure: go.Figure, result: InputProbe) -> None:
    for basis in result.accuracy:
        title, color, symbol = _BASES[basis]
        marker = {"symbol": symbol, "size": 9, "color": color}
        figure.add_trace(go.Scatter(name=title, x=[None], y=[None], mode="markers", marker=marker))
    for kind in result.maps:
        title, dash, outline = _KINDS[kind]
        figure.add_trace(
            go.Scatter(
                name=title,
                x=[None],
                y=[None],
                mode="lines+markers",
                line={"color": INK, "width": 1.5, "dash": dash},
                marker={"symbol": "circle" + outline, "size": 8},
            )
        )
    figure.add_trace(
        go.Scatter(
            name="random maps (95%)", x=[None], y=[None], mode="lines", line={"color": ABSENT, "width": 9}
        )
    )


def _add_accuracy(figure: go.Figure, result: InputProbe, basis: str, shift: float) -> None:
    title, color, symbol = _BASES[basis]
    places = [index + shift for index in range(len(result.rows))]
    for m, kind in enumerate(result.maps):
        kind_title, dash, outline = _KINDS[kind]
        accuracy = result.accuracy[basis][m].tolist()
        low, high = result.accuracy_interval[basis][m].T.tolist()
        figure.add_trace(
            go.Scatter(
                name=f"accuracy {basis} {kind}",
                x=places,
                y=accuracy,
                mode="lines+markers",
                line={"color": color, "width": 1.5, "dash": dash},
                marker={
                    "symbol": symbol + outline,
                    "size": _size(result),
                    "color": color,
                    "line": {"width": 1.5},
                },
                showlegend=False,
                hovertext=[
                    f"<b>{figure_text(row)}</b>, {figure_text(title)}, {kind_title}<br>"
                    f"accuracy {number(value)} ({number(bottom)} to {number(top)})<br>R² {number(r2)}"
                    for row, value, bottom, top, r2 in zip(
                        result.rows, accuracy, low, high, result.r2[basis][m].tolist(), strict=True
                    )
                ],
                hoverinfo="text",
            ),
            row=1,
            col=1,
        )


def _add_compared(
    figure: go.Figure, result: InputProbe, basis: str, measure: str, panel: tuple[int, int], shift: float
) -> None:
    title, color, symbol = _BASES[basis]
    values = getattr(result, measure)[basis].tolist()
    mean, low, high = getattr(result, f"{measure}_null")[basis].T.tolist()
    places = [index + shift for index in range(len(result.fits))]
    figure.add_trace(
        go.Scatter(
            name=f"{measure} {basis}",
            x=places,
            y=values,
            mode="markers",
            marker={"symbol": symbol, "size": _size(result), "color": color},
            showlegend=False,
            hovertext=[
                f"<b>{figure_text(fit)}</b>, {figure_text(title)}<br>{number(value)}<br>"
                f"random maps {number(middle)} ({number(bottom)} to {number(top)})"
                for fit, value, middle, bottom, top in zip(result.fits, values, mean, low, high, strict=True)
            ],
            hoverinfo="text",
        ),
        row=panel[0],
        col=panel[1],
    )


def _add_null(
    figure: go.Figure, result: InputProbe, basis: str, measure: str, panel: tuple[int, int], shift: float
) -> None:
    _, low, high = getattr(result, f"{measure}_null")[basis].T.tolist()
    ends = [each for pair in zip(low, high, strict=True) for each in (*pair, None)]
    places = [each for index in range(len(low)) for each in (index + shift, index + shift, None)]
    figure.add_trace(
        go.Scatter(
            name=f"{measure} {basis} null",
            x=places,
            y=ends,
            mode="lines",
            line={"color": ABSENT, "width": _size(result)},
            showlegend=False,
            hoverinfo="skip",
        ),
        row=panel[0],
        col=panel[1],
    )
