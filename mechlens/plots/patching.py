"""Figures of patching and ablation: what each patch changes, by layer and head or position."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from torch import Tensor

from mechlens.arguments import check_counts, check_type
from mechlens.plots.style import (
    ABSENT,
    BLUE,
    GRID,
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
from mechlens.results import AttributionPatchResult, PatchGridResult, head_label
from mechlens.text.display import number, turns, visible_token

if TYPE_CHECKING:
    import pandas as pd

VALUES = ("effect", "mean", "recovered")
Patches = PatchGridResult | AttributionPatchResult
_LABEL = 12
_WRITTEN = 60
"""Cells up to which each holds its number."""
_NAMED = 5
"""Of a larger grid, as many of the largest effects have their numbers."""
_ROOM = 34
"""Width of a cell that a number fits into, in pixels."""
_NO_TICKS = {"ticks": "", "showgrid": False}


def metric_unit(metric: str) -> str:
    """The unit of a metric, for an axis; empty for a function of the user's."""
    return {"logit_diff": "logits"}.get(metric, "nats" if metric in ("loss", "log_prob", "kl") else "")


def cell_label(layer: int, head: int | None, position: int | None) -> str:
    """The name of a cell of a grid: `L5H5`, `L0 at 51`."""
    place = f"L{layer}" if head is None else head_label(layer, head)
    return place if position is None else f"{place} at {position}"


def largest_effects(result: Patches, top: int) -> pd.DataFrame:
    """The rows of `to_dataframe()` with the largest effects, either way; a column `cell` names them."""
    table = result.to_dataframe().dropna(subset="effect")
    table = table.sort_values("effect", key=abs, ascending=False, kind="stable").head(top)
    places = [table[axis] if axis in table else [None] * len(table) for axis in ("layer", "head", "pos")]
    table["cell"] = [cell_label(*cell) for cell in zip(*places, strict=True)]
    return table


def plot_patch_grid(
    result: Patches,
    *,
    value: str = "effect",
    head: int | None = None,
    position: int | None = None,
) -> go.Figure:
    """Draw what each patch does to the metric: a heatmap by layer and position or head, bars by layer alone.

    Layer 0 is at the bottom. Effects are coloured around 0, blue where the patch raises the metric and orange
    where it lowers it (which is worse for a loss, better for a logit difference); a cell without a value is
    grey. A grid of at most 60 cells holds its numbers, a larger one those of the 5 largest effects (of a
    position the largest alone), where they fit; the title names the first 3. Under the cursor stand the
    numbers with their standard error. Where there are several prompts, positions have numbers in the place of
    tokens.

    Args:
        result: of `patch_grid` and what is made of it, or of `attribution_patching`, whose figure says that
            it is an estimate.
        value: `effect`, the metric's change; `mean`, the metric itself; `recovered`, the share of the way to
            the other run.
        head: which head, for a grid of layer x head x position.
        position: or which position.

    Raises:
        ValueError: another `value`, a head or position that is not there or not chosen, or a result without
            `recovered`.
    """
    check_type("result", result, PatchGridResult, AttributionPatchResult)
    if value not in VALUES:
        raise ValueError(f"value must be one of {', '.join(VALUES)}, but is {value!r}")
    if value == "recovered" and bool(result.recovered.isnan().all()):
        raise ValueError(
            "recovered is the share of the way to a corrupted run, but here is none that differs"
        )
    axes, index = _chosen(result, head, position)
    values = getattr(result, value)[index].double().cpu()
    hovers = _hovers(result, axes, head, position)
    figure = _bars(result, values, value, hovers) if len(axes) == 1 else go.Figure()
    if len(axes) == 2:
        across = _across(result, axes[1])
        rows = len(result.layers)
        largest = _largest(result, axes, index)
        cells = _heatmap(values, value, hovers)
        if across["width"] - 140 >= _ROOM * values.shape[1]:
            few = values.numel() <= _WRITTEN
            texts = _texts(values, None if few else largest)
            cells.update(text=texts, texttemplate="%{text}", textfont={"size": 12 if few else 10})
        figure.add_trace(cells)
        named = [_named(result, axes, place, float(values[place]), head, position) for place in largest[:3]]
        words = "largest effects" if axes[1] == "head" else "largest by position"
        title = _title(
            result, value, head, position, f"{words}: {', '.join(named)}" if named else "no effects"
        )
        figure.update_layout(**across)
        figure.update_layout(
            height=top_margin(title)
            + (110 if axes[1] == "pos" else 60)
            + rows * (52 if rows <= 4 else 30 if rows <= 12 else 16),
            yaxis={
                "title": {"text": "layer"},
                **_ticks([str(layer) for layer in result.layers], 32),
                **_NO_TICKS,
            },
            # between the cells that have a value
            plot_bgcolor=ABSENT if bool(values.isnan().any()) else "white",
        )
    else:
        title = _title(result, value, head, position)
    figure.update_layout(template=TEMPLATE, title_text=title, margin={"t": top_margin(title)})
    return figure


def plot_head_effects(result: Patches, *, top: int = 15, position: int | None = None) -> go.Figure:
    """Draw the heads whose patch changes the metric most, either way, as bars with their standard errors.

    Args:
        top: how many heads, at least 1.
        position: which position, for a grid of layer x head x position.

    Raises:
        ValueError: the result is not by head, no position was chosen, or `top` is below 1.
    """
    check_type("result", result, PatchGridResult, AttributionPatchResult)
    check_counts(top=top)
    if "head" not in result.axes:
        raise ValueError(f"this result is by {' and '.join(result.axes)}, not by head")
    axes, index = _chosen(result, None, position)
    effect, error = (each[index].double().cpu() for each in (result.effect, result.standard_error))
    hovers = _hovers(result, axes, None, position)
    cells = [
        (float(effect[row, column]), row, column)
        for row in range(len(result.layers))
        for column in range(len(result.heads))
    ]
    known = sorted((cell for cell in cells if cell[0] == cell[0]), key=lambda cell: -abs(cell[0]))[:top]
    title = _title(result, "effect", None, position, f"the {len(known)} largest of {len(cells)} heads")
    labels = [head_label(result.layers[row], result.heads[column]) for _, row, column in known]
    figure = go.Figure(
        go.Bar(
            name="effect",
            orientation="h",
            x=[value for value, _, _ in known],
            y=labels,
            marker={"color": [BLUE if value >= 0 else VERMILION for value, _, _ in known]},
            # a single prompt has no standard error
            error_x={
                "visible": len(result.tokens) > 1,
                "type": "data",
                "array": [float(error[row, column]) for _, row, column in known],
                "color": INK,
                "thickness": 1.5,
                "width": 5,
            },
            hovertext=[hovers[row][column] for _, row, column in known],
            hoverinfo="text",
        )
    )
    figure.update_layout(
        template=TEMPLATE,
        title_text=title,
        width=620,
        height=top_margin(title) + 66 + 24 * len(known),
        margin={"t": top_margin(title)},
        bargap=0.3,
        xaxis={"title": {"text": _axis_title(result, "effect")}, "zeroline": True, "zerolinecolor": MUTED},
        # Categories, because plotly would read labels such as `1E5` as numbers.
        yaxis={"type": "category", "autorange": "reversed", "ticks": "", "gridcolor": GRID},
    )
    return figure


# -- parts -----------------------------------------------------------------------------------------


def _chosen(
    result: Patches, head: int | None, position: int | None
) -> tuple[tuple[str, ...], tuple[int | slice, ...]]:
    """The axes that are drawn, and the index that takes them out of the grid."""
    given = {"head": (head, result.heads), "pos": (position, result.positions)}
    index: list[int | slice] = [slice(None)] * len(result.axes)
    for axis, (wanted, known) in given.items():
        if wanted is None:
            continue
        name = "position" if axis == "pos" else axis
        if axis not in result.axes:
            raise ValueError(f"this result is by {' and '.join(result.axes)}: leave out {name}")
        if wanted not in known:
            raise ValueError(f"no {name} {wanted} was patched; patched were {', '.join(map(str, known))}")
        index[result.axes.index(axis)] = known.index(wanted)
    axes = tuple(axis for axis, at in zip(result.axes, index, strict=True) if isinstance(at, slice))
    if len(axes) > 2:
        raise ValueError("this result is by layer, head and position: choose a head or a position to draw")
    return axes, tuple(index)


def _heatmap(values: Tensor, value: str, hovers: list[list[str]]) -> go.Heatmap:
    known = values[~values.isnan()]
    high = float(known.abs().max()) if known.numel() else 0.0
    high = max(high, 1.0 if value == "recovered" else 1e-6)
    # what cannot be negative, such as a loss, needs no other half
    low = 0.0 if value == "mean" and bool((known >= 0).all()) else -high
    drawn = heatmap(values.numpy(), low=low, high=high, hovers=hovers, name=value, xgap=1, ygap=1)
    drawn.colorbar.update(tickformat=".3~g")
    return drawn


def _largest(result: Patches, axes: tuple[str, ...], index: tuple[int | slice, ...]) -> list[tuple[int, int]]:
    """Where the largest effects are that are drawn, either way and the largest first; of a position, whose
    layers are much alike, the largest alone."""
    effect = result.effect[index].double().cpu().abs().nan_to_num(0)
    layers, columns = effect.nonzero().T.tolist()
    if axes[1] == "pos":
        columns = effect.any(0).nonzero()[:, 0].tolist()
        layers = effect.argmax(0)[columns].tolist()
    places = list(zip(layers, columns, strict=True))
    return sorted(places, key=lambda place: -float(effect[place]))[:_NAMED]


def _named(
    result: Patches,
    axes: tuple[str, ...],
    place: tuple[int, int],
    value: float,
    head: int | None,
    position: int | None,
) -> str:
    """A cell with its number: `L23H3 2.85`, `L0 at 4 ·Tower 0.12`."""
    by_head = axes[1] == "head"
    at = position if by_head else result.positions[place[1]]
    label = cell_label(result.layers[place[0]], result.heads[place[1]] if by_head else head, at)
    if at is not None and len(result.tokens) == 1:
        label += f" {visible_token(result.strings[at], longest=_LABEL)}"
    return f"{label} {number(value, 2)}"


def _texts(values: Tensor, only: list[tuple[int, int]] | None) -> list[list[str]]:
    """The numbers of all cells, or of some, as they stand in them."""
    return [
        [
            number(value, 2) if value == value and (only is None or (row, column) in only) else ""
            for column, value in enumerate(line)
        ]
        for row, line in enumerate(values.tolist())
    ]


def _bars(result: Patches, values: Tensor, value: str, hovers: list[list[str]]) -> go.Figure:
    colours = [BLUE if each >= 0 else VERMILION for each in values.tolist()]
    bars = go.Bar(
        name=value,
        x=[str(layer) for layer in result.layers],
        y=values.tolist(),
        marker={"color": colours if value == "effect" else BLUE},
        hovertext=[row[0] for row in hovers],
        hoverinfo="text",
    )
    if value == "effect" and len(result.tokens) > 1:
        errors = result.standard_error.double().tolist()
        bars.error_y = {"type": "data", "array": errors, "color": INK, "thickness": 1.5, "width": 5}
    figure = go.Figure(bars)
    figure.update_layout(
        width=max(520, min(WIDTH, 260 + 36 * len(result.layers))),
        height=430,
        bargap=0.3,
        xaxis={"type": "category", "title": {"text": "layer"}, **_NO_TICKS},
        yaxis={"title": {"text": _axis_title(result, value)}, "zeroline": True, "zerolinecolor": MUTED},
    )
    return figure


def _across(result: Patches, axis: str) -> dict[str, Any]:
    """Width and horizontal axis of a heatmap."""
    if axis == "head":
        n_heads = len(result.heads)
        ticks = _ticks([str(head) for head in result.heads], 32)
        return {
            "width": max(640, min(WIDTH, 170 + n_heads * (56 if n_heads <= 12 else 28))),
            "xaxis": {"title": {"text": "head"}, **ticks, **_NO_TICKS},
        }
    n_pos, several = len(result.positions), len(result.tokens) > 1
    labels = [
        str(position) if several else figure_text(visible_token(result.strings[position], longest=_LABEL))
        for position in result.positions
    ]
    begins = {} if several else turns(result.strings)
    labels = [
        f"<b>{begins[position]}</b> {label}" if position in begins else label
        for position, label in zip(result.positions, labels, strict=True)
    ]
    title = "patched position" if several else "patched token"
    return {
        "width": max(620, min(WIDTH, 150 + n_pos * (40 if n_pos <= 16 else 18))),
        "xaxis": {
            "title": {"text": title},
            **_ticks(labels, 26 if several else 64),
            "tickangle": 0 if several else -90,
            **_NO_TICKS,
        },
    }


def _ticks(labels: list[str], most: int) -> dict[str, object]:
    step = max(1, math.ceil(len(labels) / most))
    return {"tickvals": list(range(0, len(labels), step)), "ticktext": labels[::step]}


def _hovers(
    result: Patches, axes: tuple[str, ...], head: int | None, position: int | None
) -> list[list[str]]:
    """What stands under the cursor, by layer and whatever else is drawn."""
    _, index = _chosen(result, head, position)
    parts = {
        name: getattr(result, name)[index].double().reshape(len(result.layers), -1).tolist()
        for name in ("effect", "standard_error", "mean", "recovered")
    }
    across: tuple[int | None, ...] = (None,)
    if len(axes) == 2:
        across = result.heads if axes[1] == "head" else result.positions
    by_head = len(axes) == 2 and axes[1] == "head"
    unit = metric_unit(result.metric)
    metric = figure_text(result.metric)
    base = result.clean if result.direction == "noising" else result.corrupted
    rows = []
    for row, layer in enumerate(result.layers):
        texts = []
        for column, other in enumerate(across):
            at_head = other if by_head else head
            at = position if by_head else other if other is not None else position
            text = f"<b>{head_label(layer, at_head) if at_head is not None else f'layer {layer}'}</b>"
            if at is not None:
                text += f"<br>position {at}"
                if len(result.tokens) == 1:
                    text += f": {figure_text(visible_token(result.strings[at]))}"
            effect, error, mean, recovered = (parts[name][row][column] for name in parts)
            text += f"<br>{metric} changes by {_signed(effect)} {unit}".rstrip()
            text += "" if error != error else f"<br>standard error {number(error)}"
            text += f"<br>patched {number(mean)}, without the patch {number(float(base.mean()))}"
            text += "" if recovered != recovered else f"<br>recovered {number(recovered)}"
            texts.append(text)
        rows.append(texts)
    return rows


def _signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)


def _axis_title(result: Patches, value: str) -> str:
    unit = metric_unit(result.metric)
    if value == "recovered":
        return _share(result)
    words = result.metric if value == "mean" else f"change of {result.metric}"
    words = f"estimated {words}" if isinstance(result, AttributionPatchResult) else words
    return f"{words} ({unit})" if unit else words


def _title(result: Patches, value: str, head: int | None, position: int | None, more: str = "") -> str:
    what = {
        "effect": f"Change of {result.metric}",
        "mean": result.metric.capitalize() if result.metric == "loss" else result.metric,
        "recovered": _share(result).capitalize(),
    }[value]
    unit = "" if value == "recovered" else metric_unit(result.metric)
    site = result.site if head is None else f"{result.site} of head {head}"
    site += "" if position is None else f" at position {position}"
    patched = "the corrupted run" if result.direction == "denoising" else "the clean run"
    n_prompts = len(result.tokens)
    return titles(
        f"{what}{f' ({unit})' if unit else ''}, {site} patched",
        result.model.name,
        f"with: {put_there(result)}; into {patched}; {n_prompts} prompt{'s' if n_prompts != 1 else ''}",
        *([metric_words(result)] if result.about or value == "recovered" else []),
        *([more] if more else []),
        *(["an estimate to first order"] if isinstance(result, AttributionPatchResult) else []),
    )


def metric_words(result: Patches) -> str:
    """The metric and, where it is of one token or two, which."""
    return f"{result.metric} of {figure_text(result.about)}" if result.about else result.metric


def _share(result: Patches) -> str:
    run = "clean" if result.direction == "denoising" else "corrupted"
    return f"share of the way to the {run} run"


def put_there(result: Patches) -> str:
    """Where the values come from, in words."""
    source = "a function's values" if result.source == "<lambda>" else result.source
    return source if result.weight == 1 else f"{source}, weight {result.weight:g}"
