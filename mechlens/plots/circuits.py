"""Figures of circuits: their entries and eigenvalues, and attention by positions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch
from jaxtyping import Complex
from torch import Tensor

from mechlens.arguments import check_type
from mechlens.plots.style import (
    BLUE,
    GRID,
    MUTED,
    NO_TICKS,
    TEMPLATE,
    VERMILION,
    WIDTH,
    figure_text,
    heatmap,
    titles,
    top_margin,
)
from mechlens.results import Circuit, PositionalAttention, head_label
from mechlens.text.display import number, visible_token

if TYPE_CHECKING:
    import pandas as pd

DECADES = 4
"""Powers of ten below the largest eigenvalue; smaller ones are drawn at the center."""
_LABEL = 14
_WRITTEN = 12
"""With up to this many rows and columns, each cell of a corner shows its number."""


def plot_circuit_corner(table: pd.DataFrame, circuit: Circuit | None = None) -> go.Figure:
    """Draw a corner of a circuit with its tokens along both sides.

    Colors are centered at 0. With at most 12 rows and columns, the entries are written into their cells.

    Args:
        table: entries, as returned by `circuit_corner`.
        circuit: the circuit, for the title.

    Returns:
        A plotly figure.

    Raises:
        ValueError: the table is empty, or its axes differ from the circuit's.

    Example:
        >>> circuit = mechlens.full_OV(model, "L3H5")
        >>> table = mechlens.circuit_corner(model, circuit, [" the", " of"])
        >>> mechlens.plot_circuit_corner(table, circuit).layout.yaxis.title.text
        'source'
    """
    import pandas as pd

    check_type("table", table, pd.DataFrame)
    if table.empty:
        raise ValueError("there is nothing to draw: the table has no entries")
    axes = str(table.index.name), str(table.columns.name)
    if circuit is not None and axes != circuit.axes:
        raise ValueError(
            f"the table's axes are {' and '.join(axes)}, but the axes of the {circuit.name} are "
            f"{' and '.join(circuit.axes)}: pass a table from circuit_corner"
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
            **NO_TICKS,
        }
        for side in (table.index, table)
    ]
    title = titles(
        "Part of a circuit" if circuit is None else circuit.title,
        *([] if circuit is None else [circuit.model.name, circuit.entry]),
        *filter(None, [circuit.rotation if circuit is not None else ""]),
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
    """Draw a circuit's eigenvalues in the complex plane, with their log magnitude as the radius.

    Eigenvalues on the right belong to directions that the circuit maps to themselves (copying, matching),
    those on the left to directions that it reverses. Eigenvalues more than four powers of ten below the
    largest are drawn at the center.

    Args:
        circuit: a square circuit, or its eigenvalues.

    Returns:
        A plotly figure.

    Raises:
        ValueError: the circuit is not square or not finite.

    Example:
        >>> figure = mechlens.plot_eigenvalues(mechlens.full_OV(model, "L3H5"))
        >>> [trace.name for trace in figure.data]
        ['positive real part', 'negative real part']

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    if isinstance(circuit, Circuit):
        found, score = circuit.eigenvalues().cpu(), circuit.copying_score()
        name, score_name = f" of the {circuit.name}", circuit.score_name
        about = [circuit.model.name, *filter(None, [circuit.rotation])]
    else:
        check_type("circuit", circuit, Circuit, Tensor)
        found, name, score_name, about = circuit.detach().cpu(), "", "copying score", []
        score = float(found.real.sum() / found.abs().sum()) if bool(found.abs().sum() > 0) else math.nan
    magnitudes = found.abs().double()
    largest = float(magnitudes.max()) if magnitudes.numel() and bool(magnitudes.max() > 0) else 1.0
    smallest = largest * 10.0**-DECADES
    positive = found.real >= 0
    figure = go.Figure()
    for label, some, color, symbol in (
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
                marker={"color": color, "symbol": symbol, "size": 8, "opacity": 0.8},
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
    """Draw how a head would attend based on positions alone.

    Each row is an attending position, from the top; positions that it cannot see are gray.

    Args:
        result: from `positional_attention`.

    Returns:
        A plotly figure.

    Example:
        >>> found = mechlens.PositionalAttention(
        ...     mechlens.full_OV(model, "L0H0").model, (0, 0), torch.eye(3), 0.125, True
        ... )
        >>> mechlens.plot_positional_attention(found).layout.xaxis.title.text
        'attended position (src)'
    """
    check_type("result", result, PositionalAttention)
    pattern = result.pattern.double().cpu()
    future = torch.ones_like(pattern, dtype=torch.bool).triu(1)
    axis = {**NO_TICKS, "constrain": "domain"}
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
            else "positions at their own scale",
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


def _complex(value: complex) -> str:
    sign = "+" if value.imag >= 0 else number(-1.0)[0]
    return f"{value.real:.3g} {sign} {abs(value.imag):.3g}i"
