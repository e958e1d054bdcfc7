"""The figures of a task's circuits: faithfulness by size, and the graph of the strongest edges."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import plotly.graph_objects as go

from mechlens.arguments import check_counts, check_type
from mechlens.plots.style import (
    BLUE,
    HEIGHT,
    INK,
    MUTED,
    NO_TICKS,
    TEMPLATE,
    VERMILION,
    WIDTH,
    titles,
    top_margin,
)
from mechlens.results import CircuitCurve, EdgeEffects
from mechlens.results.task_circuits import EMBED, LOGITS, SOURCES, component_of
from mechlens.text.display import count, number


def plot_circuit_curve(result: CircuitCurve) -> go.Figure:
    """Draw faithfulness against the share of edges or components that are kept, with a logarithmic axis.

    The solid line is the ranking, with 95% intervals over prompts; dotted lines are random rankings, the
    dashed one is the ranking by exact effects, where they are known; the thin line at 1 is the whole model.

    Args:
        result: from `Task.curve`.

    Returns:
        A plotly figure.

    Raises:
        TypeError: `result` is not a `CircuitCurve`.

    Example:
        >>> task = mechlens.load_task("agreement", model, n=4)
        >>> found = task.curve(task.edges(), shares=(0.01, 0.1, 1), n_random=1)
        >>> len(mechlens.plot_circuit_curve(found).data)
        2
    """
    check_type("result", result, CircuitCurve)
    table = result.to_dataframe()
    unit = "edges" if result.of_edges else "heads and MLPs"
    figure = go.Figure()
    for at, draw in enumerate(result.random_faithfulness.tolist()):
        figure.add_trace(
            go.Scatter(
                x=result.at,
                y=draw,
                name="random sets",
                legendgroup="random",
                showlegend=at == 0,
                mode="lines",
                line={"color": MUTED, "dash": "dot", "width": 1.5},
                text=[f"random: faithfulness {number(value)}" for value in draw],
                hoverinfo="text",
            )
        )
    if len(result.exact):
        exact = result.exact_faithfulness.tolist()
        figure.add_trace(
            go.Scatter(
                x=result.at,
                y=exact,
                name="by exact effects",
                mode="lines",
                line={"color": VERMILION, "dash": "dash", "width": 2},
                text=[f"ranked by exact effects: faithfulness {number(value)}" for value in exact],
                hoverinfo="text",
            )
        )
    hovers = [
        f"<b>{row['kept']:,} {unit}, {row['share']:.2%}</b><br>faithfulness {number(row['faithfulness'])}"
        f"<br>95% interval {number(row['low'])} to {number(row['high'])}"
        for row in table.to_dict("records")
    ]
    figure.add_trace(
        go.Scatter(
            x=result.at,
            y=table["faithfulness"],
            name="ranked",
            mode="lines+markers",
            line={"color": BLUE, "width": 2},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": table["high"] - table["faithfulness"],
                "arrayminus": table["faithfulness"] - table["low"],
                "color": BLUE,
                "thickness": 1,
            },
            text=hovers,
            hoverinfo="text",
        )
    )
    figure.add_hline(1, line={"color": INK, "width": 1})
    title = titles(
        result.title,
        f"ranked by {result.ranking}",
        f"CPR {number(result.cpr)}, CMD {number(result.cmd)}; {count(len(result.prompts), 'prompt')}",
        *([result.note] if result.note else []),
    )
    return figure.update_layout(
        template=TEMPLATE,
        title_text=title,
        width=720,
        height=380 + top_margin(title),
        margin={"t": top_margin(title)},
        xaxis={"title": {"text": f"share of {unit} kept"}, "type": "log", "dtick": 1, "tickformat": ".1~%"},
        yaxis={"title": {"text": "faithfulness"}},
    )


def plot_edge_graph(
    result: EdgeEffects, *, top: int = 40, absolute: bool = True, by_role: bool | None = None
) -> go.Figure:
    """Draw the most important edges of a task as a graph, from the embedding at the bottom to the logits.

    An edge is as wide as its effect is large. Blue edges help: replacing one lowers the metric. Orange,
    dashed edges hurt. Hover over the middle of an edge for its effect.

    Args:
        result: from `Task.edges`.
        top: how many edges.
        absolute: draw those with the largest effects either way; False draws those that help most.
        by_role: put each component above the role at whose positions its effect is largest. False puts it
            above the number of its head. None is True if the prompts have roles besides `END`.

    Returns:
        A plotly figure.

    Raises:
        TypeError: `result` is not an `EdgeEffects`.
        ArgumentError: `top` is below 1.

    Example:
        >>> found = mechlens.load_task("agreement", model, n=4).edges()
        >>> mechlens.plot_edge_graph(found, top=5).layout.yaxis.title.text
        'layer'
    """
    check_type("result", result, EdgeEffects)
    check_counts(top=top)
    table = result.to_dataframe().set_index("edge")
    edges = table.loc[list(result.top(top, absolute=absolute))].reset_index().to_dict("records")
    ends = {name for row in edges for name in (row["sender"], component_of(row["receiver"]))}
    if by_role is None:
        by_role = len(result.roles) > 2
    layout = _by_role(result, ends) if by_role else _by_head(result, ends)
    places = layout.places
    largest = max(abs(row["effect"]) for row in edges) or 1.0
    figure = go.Figure()
    for row in edges:
        (x0, y0), (x1, y1) = places[row["sender"]], places[component_of(row["receiver"])]
        size, helps = abs(row["effect"]) / largest, row["effect"] < 0
        figure.add_trace(
            go.Scatter(
                x=[x0, (x0 + x1) / 2, x1],
                y=[y0, (y0 + y1) / 2, y1],
                mode="lines",
                line={
                    "width": 0.8 + 7 * size,
                    "color": BLUE if helps else VERMILION,
                    "dash": "solid" if helps else "dash",
                },
                opacity=0.35 + 0.5 * size,
                text=[
                    f"<b>{row['edge'].replace('->', ' → ')}</b>"
                    f"<br>effect {number(row['effect'], signed=True)}"
                    f"<br>standard error {number(row['standard_error'])}"
                ]
                * 3,
                hoverinfo="text",
                showlegend=False,
            )
        )
    for name, (x, y) in places.items():
        figure.add_annotation(
            x=x,
            y=y,
            text=name,
            showarrow=False,
            font={"size": 11, "color": INK},
            bgcolor="white",
            bordercolor=MUTED,
            borderpad=2,
        )
    title = titles(
        f"{result.title}: the {len(edges)} {'largest effects' if absolute else 'that help most'}",
        f"{result.method}; a replaced edge carries {SOURCES[result.by]}",
        "blue: replacing the edge lowers the metric; orange, dashed: raises it",
        *([result.note] if result.note else []),
    )
    return figure.update_layout(
        template=TEMPLATE,
        title_text=title,
        width=min(WIDTH, max(760, round(190 + 70 * _length(layout.across)))),
        height=min(HEIGHT, 120 + top_margin(title) + 46 * max(6, round(_length(layout.up)))),
        margin={"t": top_margin(title)},
        xaxis={**layout.across, **NO_TICKS},
        yaxis={"title": {"text": "layer"}, **layout.up, **NO_TICKS},
    )


def _length(axis: dict[str, Any]) -> float:
    low, high = axis["range"]
    return float(high - low)


class _Layout(NamedTuple):
    """Where each component is drawn, and the axes."""

    places: dict[str, tuple[float, float]]
    across: dict[str, Any]
    up: dict[str, Any]


def _by_head(result: EdgeEffects, names: set[str]) -> _Layout:
    """Heads above their numbers; a layer's MLP to the right of its heads."""
    n_layers, n_heads = result.model.n_layers, result.model.n_heads
    across = {
        "title": {"text": "head"},
        "range": [-0.7, n_heads + 0.7],
        "tickvals": [*range(n_heads + 1)],
        "ticktext": [*map(str, range(n_heads)), "MLP"],
    }
    columns = {name: float(_head(name, n_heads)) for name in names}
    columns |= dict.fromkeys(names & {EMBED, LOGITS}, n_heads / 2)
    places = {name: (columns[name], _height(result, name)) for name in names}
    low, high = min(y for _, y in places.values()), max(y for _, y in places.values())
    up = {"range": [low - 0.6, high + 0.6], "tickvals": [*range(0, n_layers, 1 if n_layers <= 12 else 5)]}
    return _Layout(places, across, up)


def _by_role(result: EdgeEffects, names: set[str]) -> _Layout:
    """Components side by side above their role, which is as wide as its fullest layer.

    Layers of which nothing is drawn take no room.
    """
    last = result.roles[-2]
    role_of = {name: last if name == LOGITS else result.role_of(name) for name in names}
    columns: dict[str, float] = {}
    ticks: dict[str, float] = {}
    begin = 0.0
    for role in result.roles:
        rows: dict[float, list[str]] = defaultdict(list)
        for name in sorted(names, key=lambda name: _head(name, result.model.n_heads)):
            if role_of[name] == role:
                rows[_height(result, name)].append(name)
        if not rows:
            continue
        width = max(map(len, rows.values()))
        for row in rows.values():
            start = begin + (width - len(row)) / 2
            columns |= {name: start + at for at, name in enumerate(row)}
        ticks[role] = begin + (width - 1) / 2
        begin += width + 0.4
    across = {
        "title": {"text": "role where the effect is largest"},
        "range": [-0.7, begin - 0.7],
        "tickvals": [*ticks.values()],
        "ticktext": [*ticks],
    }
    heights = sorted({_height(result, name) for name in names})
    places = {name: (columns[name], float(heights.index(_height(result, name)))) for name in names}
    layers = {int(height): row for row, height in reversed([*enumerate(heights)])}
    own = {layer: row for layer, row in layers.items() if 0 <= layer < result.model.n_layers}
    up = {"range": [-0.6, len(heights) - 0.4], "tickvals": [*own.values()], "ticktext": [*map(str, own)]}
    return _Layout(places, across, up)


def _head(name: str, n_heads: int) -> int:
    """The number of a head; after all heads, an MLP, the embedding and the logits."""
    return int(name.partition("H")[2]) if "H" in name else n_heads


def _height(result: EdgeEffects, name: str) -> float:
    """The layer of a component; an MLP is a little above its heads."""
    if name in (EMBED, LOGITS):
        return -1.0 if name == EMBED else float(result.model.n_layers)
    layer = name[1:].partition("." if name.endswith(".mlp") else "H")[0]
    return int(layer) + (0.35 if name.endswith(".mlp") else 0)
