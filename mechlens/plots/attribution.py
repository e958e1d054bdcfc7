"""Pictures of direct logit attribution: which components speak for a token and which against it."""

from __future__ import annotations

import math

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechlens.arguments import check_counts, check_type
from mechlens.plots.style import (
    BLUE,
    INK,
    MUTED,
    TEMPLATE,
    VERMILION,
    WIDTH,
    heatmap,
    number,
    titles,
    turns,
    visible_token,
)
from mechlens.results import LogitAttribution, component_place

_LONGEST = 24
_NO_TICKS = {"ticks": "", "showgrid": False}


def plot_attribution(
    result: LogitAttribution, *, row: int = 0, position: int = -1, largest: int = 12
) -> go.Figure:
    """Draw what each component adds to the logit at one position: by layer and head, and the largest as bars.

    In the heatmap layer 0 is at the bottom; the bias of the attention and the MLP stand beside the heads.
    Blue speaks for the token, orange against it. Embeddings and the final bias, which belong to no layer, are
    among the bars however small they are, and the bars together are the whole logit. Under the cursor stand
    the numbers.

    Args:
        row: which sequence of the batch; negative counts from the end.
        position: which of the positions that were read; negative counts from the end.
        largest: how many of the components of layers get a bar.

    Raises:
        ValueError: there is no such sequence or position, or `largest` is below 1.
    """
    check_type("result", result, LogitAttribution)
    given = (("sequence", row, len(result.tokens)), ("position", position, len(result.positions)))
    for name, index, count in given:
        if not -count <= index < count:
            raise ValueError(f"there is no {name} {index}: there are {count}")
    check_counts(largest=largest)
    values = _values(result, row, position)
    n_layers, n_heads = result.model.n_layers, result.model.n_heads
    has_mlp = "L0 MLP" in values
    # an empty column sets what is no head apart
    columns = [*(f"H{head}" for head in range(n_heads)), "", " bias", *([" MLP"] if has_mlp else [])]
    names = [[f"L{layer}{column}" if column else "" for column in columns] for layer in range(n_layers)]
    cells = [[values.get(name, math.nan) for name in line] for line in names]
    of_layers = {name: value for name, value in values.items() if _of_layer(name)}
    high = max(1e-6, *map(abs, of_layers.values()))
    digits = 2 if n_heads <= 8 else 1
    # a cell without a component stays empty; more than 16 heads leave no room
    written = [
        [_written(value, digits) if n_heads <= 16 and value == value else "" for value in line]
        for line in cells
    ]

    bars = _bars(values, of_layers, largest)
    figure = make_subplots(
        cols=2,
        column_widths=[0.62, 0.38],
        horizontal_spacing=0.2,
        subplot_titles=("by layer", "largest, embeddings and final bias"),
    )
    figure.add_trace(
        heatmap(
            cells,
            low=-high,
            high=high,
            hovers=[
                [f"<b>{name}</b><br>adds {number(values.get(name, math.nan))}" for name in line]
                for line in names
            ],
            name="by layer",
            text=written,
            texttemplate="%{text}",
            textfont={"size": 12 if n_heads <= 8 else 10},
            xgap=1,
            ygap=1,
        ),
        col=1,
        row=1,
    )
    figure.data[0].colorbar.update(x=0.5, xanchor="left", tickformat=".3~g", len=1.05)
    figure.add_trace(
        go.Bar(
            name="largest",
            orientation="h",
            x=list(bars.values()),
            y=list(bars),
            marker={"color": [BLUE if value >= 0 else VERMILION for value in bars.values()]},
            text=[_written(value, 2) for value in bars.values()],
            textposition="outside",
            textfont={"color": INK},
            cliponaxis=False,
            hovertext=[f"<b>{name}</b><br>adds {number(value)}" for name, value in bars.items()],
            hoverinfo="text",
        ),
        col=2,
        row=1,
    )
    step = 1 if n_heads <= 16 else 2 if n_heads <= 32 else 4
    ticks = [at for at in range(len(columns)) if at > n_heads or (at < n_heads and at % step == 0)]
    labels = [str(at) if at < n_heads else columns[at].strip() for at in ticks]
    # room for the numbers beyond the bars' ends
    low_end, high_end = min(0.0, *bars.values()), max(0.0, *bars.values())
    room = 0.28 * max(high_end - low_end, 1e-6)
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(*attribution_title(result, row=row, position=position)),
        width=min(WIDTH, 560 + len(columns) * (52 if n_heads <= 8 else 40 if n_heads <= 16 else 20)),
        height=max(
            200 + n_layers * (46 if n_layers <= 6 else 30 if n_layers <= 24 else 16), 190 + 21 * len(bars)
        ),
        margin={"t": 128},
        showlegend=False,
        bargap=0.3,
        xaxis={"title": {"text": "head"}, "tickvals": ticks, "ticktext": labels, "tickangle": 0, **_NO_TICKS},
        yaxis={"title": {"text": "layer"}, "dtick": 1 if n_layers <= 16 else 4, **_NO_TICKS},
        xaxis2={
            "title": {"text": "added to the logit"},
            "range": [low_end - (room if low_end < 0 else 0), high_end + (room if high_end > 0 else 0)],
            "zeroline": True,
            "zerolinecolor": MUTED,
        },
        yaxis2={"type": "category", "autorange": "reversed", "showgrid": False, "ticks": ""},
    )
    figure.update_annotations(font={"size": 13, "color": MUTED})
    return figure


def _written(value: float, digits: int) -> str:
    """A number with one digit more where it would round to nothing, and without a sign if it still does."""
    digits += abs(value) < 0.5 * 10**-digits
    return number(value if abs(value) >= 0.5 * 10**-digits else 0.0, digits)


def _bars(values: dict[str, float], of_layers: dict[str, float], largest: int) -> dict[str, float]:
    """The largest components of layers and all that belong to no layer, by size; last what is left."""
    ranked = sorted(of_layers, key=lambda name: -abs(values[name]))
    shown = ranked[:largest] + [name for name in values if name not in of_layers]
    bars = {name: values[name] for name in sorted(shown, key=lambda name: -abs(values[name]))}
    rest = ranked[largest:]
    return bars | ({f"{len(rest)} others": sum(values[name] for name in rest)} if rest else {})


def largest_parts(
    result: LogitAttribution, *, row: int = 0, position: int = -1, largest: int = 12
) -> dict[str, float]:
    """What the bars of `plot_attribution` show: by component what it adds; last what is left."""
    values = _values(result, row, position)
    return _bars(values, {name: value for name, value in values.items() if _of_layer(name)}, largest)


def attribution_title(result: LogitAttribution, *, row: int = 0, position: int = -1) -> tuple[str, str, str]:
    """What is explained: the logit, the model, and after which tokens."""

    def shown(token: int) -> str:
        return f"“{visible_token(result.strings[str(token)], longest=_LONGEST)}”"

    at = result.positions[position]
    of = f"logit of {shown(int(result.target_ids[row, position]))}"
    if result.against_ids is not None:
        of += f" less that of {shown(int(result.against_ids[row, position]))}"
    read = result.tokens[row, : at + 1].tolist()[-6:]
    text = "".join(visible_token(result.strings[str(token)], longest=_LONGEST) for token in read)
    text = ("…" if at >= len(read) else "") + text
    texts = [result.strings[str(token)] for token in result.tokens[row, : at + 1].tolist()]
    turn = list(turns(texts).values())[-1:]
    return (
        f"Direct attribution of the {of}: {number(float(result.logit[row, position]), 2)}",
        result.model.name,
        f"after {text} (position {at}{''.join(f', turn of the {role}' for role in turn)})",
    )


def _values(result: LogitAttribution, row: int, position: int) -> dict[str, float]:
    added = result.contributions[:, row, position].double().tolist()
    return dict(zip(result.components, added, strict=True))


def _of_layer(component: str) -> bool:
    return component_place(component)[0] is not None
