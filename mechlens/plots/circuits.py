"""Figures of circuits: which heads compose, and what a product of weights holds."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from mechlens.arguments import check_counts, check_type
from mechlens.measures import weights as measures
from mechlens.plots.style import (
    ABSENT,
    BLUE,
    GRID,
    HEIGHT,
    INK,
    MUTED,
    TEMPLATE,
    VERMILION,
    WIDTH,
    figure_text,
    heatmap,
    titles,
    top_margin,
)
from mechlens.results import Circuit, CompositionScores, PositionalAttention, head_label
from mechlens.text.color import SEQUENTIAL, sequential
from mechlens.text.display import number, visible_token

if TYPE_CHECKING:
    import pandas as pd

_DEEP = 8
"""Layers from which on those without an edge may share a line of the graph."""
DECADES = 4
"""Powers of ten below the largest eigenvalue; what is smaller is drawn as if it were not."""
FAINTEST = 0.3
"""Where on the colour scale the weakest edge begins: what is lighter is lost on white."""
_LABEL = 14
_NO_TICKS = {"ticks": "", "showgrid": False}
_WRITTEN = 12
"""Rows and columns up to which each cell of a corner holds its number."""
_CLEAR = 0.45
"""How far an edge stays from heads that it passes, where it can: their names have half this width."""
_ROTARY = {
    "ignored": "queries and keys without their rotation",
    "unrotated": "only the dimensions that are not rotated",
}


def rotation_words(result: Circuit | CompositionScores) -> str:
    """What became of the rotation of queries and keys, for a title; empty where there is none."""
    if result.rotary == "relative":
        return f"each key {result.relative_position} before its query"
    return _ROTARY.get(result.rotary, "")


def eigenvalue_score_name(circuit: Circuit) -> str:
    """What the eigenvalues' score says of a circuit: one of queries and keys matches, others copy."""
    return "matching score" if circuit.axes == ("query", "key") else "copying score"


def strongest_pairs(result: CompositionScores, top: int) -> pd.DataFrame:
    """The first `top` rows of `to_dataframe()` that are above the baseline.

    Raises:
        ValueError: `top` is below 1.
    """
    check_counts(top=top)
    table = result.to_dataframe().head(top)
    return table[table["over_baseline"] > 0]


def plot_composition_scores(result: CompositionScores) -> go.Figure:
    """Draw how much each later head (to the right) could read of what each earlier one (upward) writes.

    Colours are scores less the baseline's mean, blue where they are above it; a pair that is not of an
    earlier and a later layer is grey. Lines stand between layers. Under the cursor stand both heads, their
    score, and how many standard deviations of the baseline it lies above the mean.

    Raises:
        ValueError: the model has one layer, and so no such pairs.
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
        # numbers in the place of texts: of 1,000 heads there are half a million pairs
        customdata=torch.stack([scores, over / result.baseline_std], -1).float().numpy(),
        hovertemplate=(
            "<b>%{y} → %{x}</b><br>score %{customdata[0]:.3f}<br>over baseline %{z:+.3f}"
            "<br>that is %{customdata[1]:+.1f} of its standard deviations<extra></extra>"
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
        f"{row.earlier} → {row.later} {row.score:.2f}" for row in strongest_pairs(result, 3).itertuples()
    )
    title = titles(
        _composition_title(result),
        result.model.name,
        f"less the baseline's mean, {number(result.baseline_mean)}; it spreads by "
        f"{number(result.baseline_std)}",
        f"highest scores: {best}" if best else "no score is above the baseline",
        *([rotation_words(result)] if rotation_words(result) else []),
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

    An edge is wider and darker the higher the score is over the baseline. Heads without an edge are dots. Of
    more than 8 layers, several in a row without an edge share one narrow line, such as `4-9`, without dots.
    Under the cursor stand, of an edge, its score, and of a head, whom it reads and who reads it.

    Args:
        top: how many edges, at least 1; those that are not above the baseline are left out.

    Raises:
        ValueError: `top` is below 1.
    """
    check_type("result", result, CompositionScores)
    pairs = strongest_pairs(result, top).to_dict("records")
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
            hovertext=[_neighbours(head, pairs) for head in heads],
            hoverinfo="text",
        )
    )
    points: dict[str, list[Any]] = {"x": [], "y": [], "over": [], "text": []}
    # the strongest is drawn last, over the others
    for pair in reversed(pairs):
        share = pair["over_baseline"] / high
        x, y = _edge(pair, linked, places, n_heads)
        text = (
            f"<b>{pair['earlier']} → {pair['later']}</b><br>score {number(pair['score'])}"
            f"<br>over baseline +{number(pair['over_baseline'])}"
            f"<br>that is +{number(pair['z'], 1)} of its standard deviations"
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
        # a line is found under the cursor at its points alone; those near a head belong to the head
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
                    "colorscale": _edge_colours(),
                    "showscale": True,
                    "colorbar": {
                        "lenmode": "pixels",
                        "len": 360 if len(lines) > 4 else 200,
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
        f"{_composition_title(result)}: the {len(pairs)} strongest",
        result.model.name,
        f"over the baseline, {number(result.baseline_mean)}; it spreads by {number(result.baseline_std)}",
        *([rotation_words(result)] if rotation_words(result) else []),
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
        xaxis={"title": {"text": "head"}, "range": [-0.7, n_heads - 0.3], "dtick": 1, **_NO_TICKS},
        yaxis={
            "title": {"text": "layer"},
            "range": [-0.5, top_place + 0.5],
            "tickvals": [place for _, place in lines],
            "ticktext": [str(of[0]) if len(of) == 1 else f"{of[0]}-{of[-1]}" for of, _ in lines],
            **_NO_TICKS,
        },
    )
    return figure


def plot_circuit_corner(table: pd.DataFrame, circuit: Circuit | None = None) -> go.Figure:
    """Draw a part of a circuit, as `circuit_corner` gives it, with its tokens along both sides.

    Entries are coloured around 0; up to 12 rows and columns they are also written into their cells.

    Args:
        table: entries, the names of index and columns being those of the circuit's axes.
        circuit: where it is from, for the title.

    Raises:
        ValueError: an empty table, or one that is not of this circuit's axes.
    """
    import pandas as pd

    check_type("table", table, pd.DataFrame)
    if table.empty:
        raise ValueError("there is nothing to draw: the table has no entries")
    axes = str(table.index.name), str(table.columns.name)
    if circuit is not None and axes != circuit.axes:
        raise ValueError(
            f"the table's axes are {' and '.join(axes)}, but those of the {circuit.name} are "
            f"{' and '.join(circuit.axes)}: give a table of circuit_corner"
        )
    values = table.to_numpy(dtype="float64")
    texts = [[figure_text(visible_token(str(label))) for label in side] for side in (table.index, table)]
    high = max(float(abs(values).max()), 1e-6)
    small = max(values.shape) <= _WRITTEN
    hovers = [
        [
            f"{axes[0]} <b>{row}</b><br>{axes[1]} <b>{column}</b><br>{number(value)}"
            for column, value in zip(texts[1], line, strict=True)
        ]
        for row, line in zip(texts[0], values.tolist(), strict=True)
    ]
    cells = heatmap(
        values,
        low=-high,
        high=high,
        hovers=hovers,
        name="circuit",
        xgap=1,
        ygap=1,
        texttemplate="%{z:.1f}" if small else "",
    )
    cells.colorbar.update(tickformat=".2~g")
    sides = [
        {
            "tickvals": list(range(len(side))),
            "ticktext": [figure_text(visible_token(str(label), longest=_LABEL)) for label in side],
            **_NO_TICKS,
        }
        for side in (table.index, table)
    ]
    title = titles(
        "Part of a circuit" if circuit is None else f"{circuit.name[0].upper()}{circuit.name[1:]}",
        *([] if circuit is None else [circuit.model.name, _entry_words(circuit)]),
        *([rotation_words(circuit)] if circuit is not None and rotation_words(circuit) else []),
    )
    figure = go.Figure(cells)
    figure.update_layout(
        template=TEMPLATE,
        title_text=title,
        width=max(480, min(WIDTH, 220 + 44 * values.shape[1])),
        height=max(360, min(1100, 230 + 32 * values.shape[0])),
        margin={"t": top_margin(title)},
        plot_bgcolor=GRID,
        xaxis=sides[1] | {"title": {"text": axes[1]}, "tickangle": -90},
        yaxis=sides[0] | {"title": {"text": axes[0]}, "autorange": "reversed"},
    )
    return figure


def plot_eigenvalues(circuit: Circuit | Complex[Tensor, " eigenvalue"]) -> go.Figure:
    """Draw a circuit's eigenvalues in the complex plane, with the logarithm of their magnitude as radius.

    Those to the right are of directions that the circuit maps to themselves, as copying and matching do,
    those to the left of directions that it turns around. What is more than four powers of ten smaller than
    the largest stands at the centre.

    Args:
        circuit: a square one, or its eigenvalues.

    Raises:
        ValueError: a circuit that is not square or not finite.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", "Eigenvalue analysis".
    """
    if isinstance(circuit, Circuit):
        found, score = measures.eigenvalues(circuit).cpu(), measures.eigenvalue_copying_score(circuit)
        name, score_name = f" of the {circuit.name}", eigenvalue_score_name(circuit)
        about = [circuit.model.name, *([rotation_words(circuit)] if rotation_words(circuit) else [])]
    else:
        check_type("circuit", circuit, Circuit, Tensor)
        found, name, score_name, about = circuit.detach().cpu(), "", "copying score", []
        score = float(found.real.sum() / found.abs().sum()) if bool(found.abs().sum() > 0) else math.nan
    magnitudes = found.abs().double()
    largest = float(magnitudes.max()) if magnitudes.numel() and bool(magnitudes.max() > 0) else 1.0
    smallest = largest * 10.0**-DECADES
    positive = found.real >= 0
    figure = go.Figure()
    for label, some, colour, symbol in (
        ("positive real part", positive, BLUE, "circle"),
        ("negative real part", ~positive, VERMILION, "x"),
    ):
        values = found[some]
        figure.add_trace(
            go.Scatterpolar(
                name=label,
                r=magnitudes[some].clamp(min=smallest).tolist(),
                theta=values.angle().rad2deg().tolist(),
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 8, "opacity": 0.8},
                hovertext=[f"{_complex(value)}<br>magnitude {abs(value):.3g}" for value in values.tolist()],
                hoverinfo="text",
            )
        )
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(
            f"Eigenvalues{name}",
            f"{score_name} {number(score)} ({number(-1, 0)} to 1); real part positive in "
            f"{int(positive.sum())} of {len(found)}",
            *about,
        ),
        width=600,
        height=600,
        margin={"t": 118, "l": 64, "r": 64},
        legend={"y": -0.08},
        polar={
            "bgcolor": "white",
            "radialaxis": {
                "type": "log",
                "range": [math.log10(smallest), math.log10(largest)],
                "angle": 90,
                "tickangle": 90,
                "tickfont": {"size": 11},
                "gridcolor": GRID,
                "dtick": 1,
                "exponentformat": "power",
            },
            "angularaxis": {
                "tickvals": [0, 90, 180, 270],
                "ticktext": ["positive", "imaginary", "negative", ""],
                "gridcolor": GRID,
                "linecolor": MUTED,
            },
        },
    )
    return figure


def plot_positional_attention(result: PositionalAttention) -> go.Figure:
    """Draw how a head would attend by positions alone: each row is a position that attends, from the top.

    Positions that a row cannot see are grey.
    """
    check_type("result", result, PositionalAttention)
    pattern = result.pattern.double().cpu()
    future = torch.ones_like(pattern, dtype=torch.bool).triu(1)
    axis = {**_NO_TICKS, "constrain": "domain"}
    cells = heatmap(
        pattern.masked_fill(future, torch.nan).numpy(),
        low=0.0,
        high=1.0,
        hovers=[],
        name="attention",
        hovertemplate="from position %{y}<br>to position %{x}<br>attention %{z:.3f}<extra></extra>",
    )
    figure = go.Figure(cells)
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(
            f"Attention of {head_label(*result.head)} by positions alone (0 to 1)",
            result.model.name,
            "each position's vector divided by its own scale"
            if result.normalized_positions
            else "positions as short as they are beside the rest of the stream",
        ),
        width=640,
        height=640,
        plot_bgcolor=GRID,
        xaxis={"title": {"text": "attended position (src)"}, **axis},
        yaxis={
            "title": {"text": "attending position (dest)"},
            "autorange": "reversed",
            "scaleanchor": "x",
            **axis,
        },
    )
    return figure


# -- parts -----------------------------------------------------------------------------------------


def _composition_title(result: CompositionScores) -> str:
    return f"{result.kind.upper()}-composition of heads"


def _heads_axis(names: list[str], n_heads: int) -> dict[str, object]:
    """Each head's name where there is room, else each layer's in the middle of its heads."""
    shown, texts = names, names
    if len(names) > 36:
        shown = names[n_heads // 2 :: n_heads]
        texts = [f"layer {name[1:].split('H')[0]}" for name in shown]
        step = -(-len(shown) // 24)
        shown, texts = shown[::step], texts[::step]
    return {"type": "category", "tickvals": shown, "ticktext": texts, **_NO_TICKS}


def _ends(pair: dict[Any, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    return (pair["earlier_layer"], pair["earlier_head"]), (pair["later_layer"], pair["later_head"])


def _layer_lines(n_layers: int, linked: set[int]) -> list[tuple[list[int], float]]:
    """What stands on the axis of layers, from below, and where: a layer, or a run of them without an edge."""
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
    """A line that leaves and arrives upright, past other layers in a bow that keeps clear of their heads, and
    within the figure where it can."""
    (first, x0), (last, x1) = _ends(pair)
    y0, y1 = places[first], places[last]
    t = torch.linspace(0, 1, points, dtype=torch.double)

    def across(t: Float[Tensor, " point"], bow: float) -> Float[Tensor, " point"]:
        return x0 + (x1 - x0) * (3 - 2 * t) * t.square() + bow * (torch.pi * t).sin()

    def clearance(bow: float) -> float:
        """Distance to the nearest head behind which the line would seem to end, up to what is enough."""
        line = across(t, bow)
        if float(line.min()) < -0.6 or float(line.max()) > n_heads - 0.4:
            return -1.0
        between = [(places[layer], head) for layer, head in linked if first < layer < last]
        heights, heads = torch.tensor(between, dtype=torch.double).T
        return min(float((across((heights - y0) / (y1 - y0), bow) - heads).abs().min()), _CLEAR)

    bow = 0.0
    if any(first < layer < last for layer, _ in linked):
        # of bows that are wide enough the first, which is the smallest
        bow = max((sign * size / 4 for size in range(7) for sign in (1, -1)), key=clearance)
    return across(t, bow).tolist(), (y0 + (y1 - y0) * t).tolist()


def _edge_colours() -> list[str]:
    """The part of the sequential scale that edges have."""
    steps = 2 * len(SEQUENTIAL)
    shades = [sequential(FAINTEST + (1 - FAINTEST) * step / steps) for step in range(steps + 1)]
    return [f"rgb({red}, {green}, {blue})" for red, green, blue in shades]


def _neighbours(head: tuple[int, int], pairs: list[dict[Any, Any]]) -> str:
    text = f"<b>{head_label(*head)}</b>"
    for words, own, other in (("reads", 1, "earlier"), ("is read by", 0, "later")):
        named = [
            f"{pair[other]} +{number(pair['over_baseline'])}" for pair in pairs if _ends(pair)[own] == head
        ]
        if named:
            text += f"<br>{words} {'<br>   '.join(named)}"
    return text if "<br>" in text else f"{text}<br>none of these pairs"


def _entry_words(circuit: Circuit) -> str:
    """What an entry is, with its unit where there is one."""
    if circuit.axes == ("query", "key"):
        return "attention score before the model's scale"
    if circuit.spaces[1] == "tokens":
        return "what attending to the source adds to the destination's logit"
    return "what the source writes to the destination"


def _complex(value: complex) -> str:
    sign = "+" if value.imag >= 0 else number(-1.0)[0]
    return f"{value.real:.3g} {sign} {abs(value.imag):.3g}i"
