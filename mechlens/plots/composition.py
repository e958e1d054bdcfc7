"""Figures of composition: which earlier heads feed which later ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.arguments import check_counts, check_type
from mechlens.plots.style import (
    ABSENT,
    HEIGHT,
    INK,
    MUTED,
    NO_TICKS,
    TEMPLATE,
    WIDTH,
    heatmap,
    titles,
    top_margin,
)
from mechlens.results import CompositionScores, head_label
from mechlens.text.color import SEQUENTIAL, sequential
from mechlens.text.display import number

if TYPE_CHECKING:
    import pandas as pd

_DEEP = 8
"""In models with more layers than this, layers without an edge may share a line of the graph."""
FAINTEST = 0.3
"""Start of the color scale for edges: lighter colors are lost on white."""
_CLEAR = 0.45
"""How far an edge stays from the heads that it passes, if possible, so as to clear their names."""


def plot_composition_scores(result: CompositionScores) -> go.Figure:
    """Draw how much each later head (across) could read of what each earlier head (up) writes.

    Colors show scores minus the baseline's mean, with blue above it. Pairs that are not from an earlier and a
    later layer are gray. Lines separate layers. Hover for both heads, their score, and its distance from the
    mean in standard deviations of the baseline.

    Args:
        result: from `composition_scores`.

    Returns:
        A plotly figure.

    Raises:
        ValueError: the model has only one layer, and so no such pairs.

    Example:
        >>> found = mechlens.composition_scores(model, "k")
        >>> mechlens.plot_composition_scores(found).layout.xaxis.title.text
        'later head, which reads'
    """
    check_type("result", result, CompositionScores)
    n_layers, n_heads = result.scores.shape[:2]
    if n_layers < 2:
        raise ValueError("heads compose across layers, but this model has only one")
    size = (n_layers - 1) * n_heads
    # no head reads what the last layer writes, and the first layer reads no head
    scores = result.scores.double().cpu()[:-1, :, 1:].reshape(size, size)
    over = scores - result.baseline_mean
    high = max(float(over.nan_to_num().abs().max()), 1e-6)
    earlier = [head_label(layer, head) for layer in range(n_layers - 1) for head in range(n_heads)]
    later = [head_label(layer, head) for layer in range(1, n_layers) for head in range(n_heads)]
    cells = heatmap(
        over.float().numpy(),
        low=-high,
        high=high,
        hovers=[],
        name=f"{result.kind}_composition",
        x=later,
        y=earlier,
        # numbers in place of texts: 1,000 heads have half a million pairs
        customdata=torch.stack([scores, over / result.baseline_std], -1).float().numpy(),
        hovertemplate=(
            "<b>%{y} → %{x}</b><br>score %{customdata[0]:.3f}<br>over baseline %{z:+.3f}"
            "<br>%{customdata[1]:+.1f} of its standard deviations<extra></extra>"
        ),
    )
    cells.colorbar.update(tickformat=".2~g")
    figure = go.Figure(cells)
    line = {"color": MUTED, "width": 1}
    for border in range(n_heads, size, n_heads):
        figure.add_vline(border - 0.5, line=line)
        figure.add_hline(border - 0.5, line=line)
    width = max(460, min(900, 26 * size))
    best = ", ".join(
        f"{row.earlier} → {row.later} {row.score:.2f}" for row in _strongest(result, 3).itertuples()
    )
    title = titles(
        result.title,
        result.model.name,
        f"minus the baseline's mean, {number(result.baseline_mean)} (standard deviation "
        f"{number(result.baseline_std)})",
        f"highest scores: {best}" if best else "no score is above the baseline",
        *filter(None, [result.rotation]),
    )
    figure.update_layout(
        template=TEMPLATE,
        title_text=title,
        width=width + 160,
        height=width + 66 + top_margin(title),
        margin={"t": top_margin(title)},
        plot_bgcolor=ABSENT,
        xaxis=_heads_axis(later, n_heads) | {"title": {"text": "later head, which reads"}, "tickangle": -90},
        yaxis=_heads_axis(earlier, n_heads) | {"title": {"text": "earlier head, which writes"}},
    )
    return figure


def plot_head_graph(result: CompositionScores, *, top: int = 20) -> go.Figure:
    """Draw the pairs of heads that compose most as a graph, layer 0 at the bottom.

    Edges are wider and darker the further their score is above the baseline. Heads without an edge are dots.
    In models of more than 8 layers, adjacent layers without an edge share one narrow line, such as `4-9`,
    without dots. Hover over an edge for its score, over a head for the heads that it reads and that read it.

    Args:
        result: from `composition_scores`.
        top: how many edges; pairs that are not above the baseline are left out.

    Returns:
        A plotly figure.

    Raises:
        ArgumentError: `top` is below 1.

    Example:
        >>> found = mechlens.composition_scores(model, "k")
        >>> mechlens.plot_head_graph(found, top=5).layout.yaxis.title.text
        'layer'
    """
    check_type("result", result, CompositionScores)
    pairs = _strongest(result, top).to_dict("records")
    n_layers, n_heads = result.scores.shape[:2]
    high = max([pair["over_baseline"] for pair in pairs], default=1.0)
    figure = go.Figure()
    linked = {head for pair in pairs for head in _ends(pair)}
    lines = _layer_lines(n_layers, {layer for layer, _ in linked})
    places = {layer: place for layers, place in lines for layer in layers}
    alone = {layers[0] for layers, _ in lines if len(layers) == 1}
    heads = [(layer, head) for layer in range(n_layers) if layer in alone for head in range(n_heads)]
    figure.add_trace(
        go.Scatter(
            name="heads",
            x=[head for _, head in heads],
            y=[places[layer] for layer, _ in heads],
            mode="markers",
            marker={
                "size": [22 if head in linked else 6 for head in heads],
                "color": ["white" if head in linked else ABSENT for head in heads],
            },
            hovertext=[_neighbors(head, pairs) for head in heads],
            hoverinfo="text",
        )
    )
    _draw_edges(figure, pairs, high, lambda pair: _edge(pair, linked, places, n_heads), len(lines))
    for layer, head in sorted(linked):
        figure.add_annotation(
            x=head,
            y=places[layer],
            text=head_label(layer, head),
            showarrow=False,
            font={"size": 11 if n_heads <= 16 else 9, "color": INK},
            bgcolor="white",
            bordercolor=MUTED,
            borderpad=2,
        )
    title = titles(
        f"{result.title}: the {len(pairs)} strongest",
        result.model.name,
        f"over the baseline, {number(result.baseline_mean)} (standard deviation "
        f"{number(result.baseline_std)})",
        *filter(None, [result.rotation]),
    )
    margin = top_margin(title)
    top_place = lines[-1][1]
    across = 1 + top_place
    figure.update_layout(
        template=TEMPLATE,
        title_text=title,
        width=max(620, min(WIDTH, 160 + 62 * n_heads)),
        height=round(min(HEIGHT, margin + 62 + max((110 if across <= 6 else 70) * across, 200))),
        margin={"t": margin},
        showlegend=False,
        hovermode="closest",
        xaxis={"title": {"text": "head"}, "range": [-0.7, n_heads - 0.3], "dtick": 1, **NO_TICKS},
        yaxis={
            "title": {"text": "layer"},
            "range": [-0.5, top_place + 0.5],
            "tickvals": [place for _, place in lines],
            "ticktext": [str(of[0]) if len(of) == 1 else f"{of[0]}-{of[-1]}" for of, _ in lines],
            **NO_TICKS,
        },
    )
    return figure


def _draw_edges(
    figure: go.Figure,
    pairs: list[dict[Any, Any]],
    high: float,
    way: Callable[[dict[Any, Any]], tuple[list[float], list[float]]],
    n_lines: int,
) -> None:
    """Add the edges, with points on them for hovering."""
    points: dict[str, list[Any]] = {"x": [], "y": [], "over": [], "text": []}
    # the strongest is drawn last, over the others
    for pair in reversed(pairs):
        share = pair["over_baseline"] / high
        x, y = way(pair)
        text = (
            f"<b>{pair['earlier']} → {pair['later']}</b><br>score {number(pair['score'])}"
            f"<br>over baseline +{number(pair['over_baseline'])}"
            f"<br>+{number(pair['z'], 1)} of its standard deviations"
        )
        red, green, blue = sequential(FAINTEST + (1 - FAINTEST) * share)
        figure.add_trace(
            go.Scatter(
                name=f"{pair['earlier']} → {pair['later']}",
                x=x,
                y=y,
                mode="lines",
                line={"color": f"rgb({red}, {green}, {blue})", "width": 1.5 + 5 * share},
                hoverinfo="skip",
            )
        )
        # hovering finds a line only at its points; those near a head belong to the head
        for place in range(3, len(x) - 3):
            points["x"].append(x[place])
            points["y"].append(y[place])
            points["over"].append(pair["over_baseline"])
            points["text"].append(text)
    if pairs:
        figure.add_trace(
            go.Scatter(
                name="scores",
                x=points["x"],
                y=points["y"],
                mode="markers",
                marker={
                    "size": 1.5,
                    "color": points["over"],
                    "cmin": 0,
                    "cmax": high,
                    "colorscale": _edge_colors(),
                    "showscale": True,
                    "colorbar": {
                        "lenmode": "pixels",
                        "len": 360 if n_lines > 4 else 200,
                        "y": 1,
                        "yanchor": "top",
                        "thickness": 12,
                        "outlinewidth": 0,
                        "ticks": "",
                        "dtick": high / 4,
                        "tickformat": ".2~g",
                    },
                },
                hovertext=points["text"],
                hoverinfo="text",
            )
        )


def _strongest(result: CompositionScores, top: int) -> pd.DataFrame:
    """The first `top` rows of the table that are above the baseline.

    Raises:
        ArgumentError: `top` is below 1.
    """
    check_counts(top=top)
    table = result.to_dataframe().head(top)
    return table[table["over_baseline"] > 0]


def _heads_axis(names: list[str], n_heads: int) -> dict[str, object]:
    """Each head's name if there is room, otherwise each layer's in the middle of its heads."""
    shown, texts = names, names
    if len(names) > 36:
        shown = names[n_heads // 2 :: n_heads]
        texts = [f"layer {name[1:].split('H')[0]}" for name in shown]
        step = -(-len(shown) // 24)
        shown, texts = shown[::step], texts[::step]
    return {"type": "category", "tickvals": shown, "ticktext": texts, **NO_TICKS}


def _ends(pair: dict[Any, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    return (pair["earlier_layer"], pair["earlier_head"]), (pair["later_layer"], pair["later_head"])


def _layer_lines(n_layers: int, linked: set[int]) -> list[tuple[list[int], float]]:
    """The ticks of the layer axis from the bottom, and their places: a layer, or a run without an edge."""
    lines: list[list[int]] = []
    for layer in range(n_layers):
        if n_layers > _DEEP and layer not in linked and lines and linked.isdisjoint(lines[-1]):
            lines[-1].append(layer)
        else:
            lines.append([layer])
    places = [0.0]
    for one, other in itertools.pairwise(lines):
        places.append(places[-1] + (1.0 if len(one) == len(other) == 1 else 0.6))
    return list(zip(lines, places, strict=True))


def _edge(
    pair: dict[Any, Any],
    linked: set[tuple[int, int]],
    places: dict[int, float],
    n_heads: int,
    points: int = 25,
) -> tuple[list[float], list[float]]:
    """A line that leaves and arrives vertically, and bows to stay clear of the heads it passes and inside the
    figure, if possible."""
    (first, x0), (last, x1) = _ends(pair)
    y0, y1 = places[first], places[last]
    t = torch.linspace(0, 1, points, dtype=torch.double)

    def across(t: Float[Tensor, " point"], bow: float) -> Float[Tensor, " point"]:
        return x0 + (x1 - x0) * (3 - 2 * t) * t.square() + bow * (torch.pi * t).sin()

    def clearance(bow: float) -> float:
        """Distance to the nearest head at which the line would seem to end, capped at what is enough."""
        line = across(t, bow)
        if float(line.min()) < -0.6 or float(line.max()) > n_heads - 0.4:
            return -1.0
        between = [(places[layer], head) for layer, head in linked if first < layer < last]
        heights, heads = torch.tensor(between, dtype=torch.double).T
        return min(float((across((heights - y0) / (y1 - y0), bow) - heads).abs().min()), _CLEAR)

    bow = 0.0
    if any(first < layer < last for layer, _ in linked):
        # the first bow that is wide enough, which is the smallest
        bow = max((sign * size / 4 for size in range(7) for sign in (1, -1)), key=clearance)
    return across(t, bow).tolist(), (y0 + (y1 - y0) * t).tolist()


def _edge_colors() -> list[str]:
    """The part of the sequential scale that edges use."""
    steps = 2 * len(SEQUENTIAL)
    shades = [sequential(FAINTEST + (1 - FAINTEST) * step / steps) for step in range(steps + 1)]
    return [f"rgb({red}, {green}, {blue})" for red, green, blue in shades]


def _neighbors(head: tuple[int, int], pairs: list[dict[Any, Any]]) -> str:
    text = f"<b>{head_label(*head)}</b>"
    for words, own, other in (("reads", 1, "earlier"), ("is read by", 0, "later")):
        named = [
            f"{pair[other]} +{number(pair['over_baseline'])}" for pair in pairs if _ends(pair)[own] == head
        ]
        if named:
            text += f"<br>{words} {'<br>   '.join(named)}"
    return text if "<br>" in text else f"{text}<br>none of these pairs"
