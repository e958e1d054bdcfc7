"""Figures of patching and ablation: what each patch changes, by layer and head or position."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from mechlens.arguments import check_counts, check_type
from mechlens.errors import ArgumentError
from mechlens.plots.style import (
    ABSENT,
    BLUE,
    GRID,
    INK,
    MUTED,
    NO_TICKS,
    TEMPLATE,
    VERMILION,
    WIDTH,
    figure_text,
    heatmap,
    strongest_heads,
    titles,
    top_margin,
)
from mechlens.results import AttributionPatchResult, PatchGridResult, head_label
from mechlens.results.patching import cell_label
from mechlens.text.display import count, number, turns, visible_token

VALUES = ("effect", "mean", "recovered")
Patches = PatchGridResult | AttributionPatchResult
_LABEL = 12
_WRITTEN = 60
"""With up to this many cells, each shows its number."""
_NAMED = 5
"""In a larger grid, this many of the largest effects show their numbers."""
_ROOM = 34
"""Width of a cell that a number fits into, in pixels."""


def plot_patch_grid(
    result: Patches, *, value: str = "effect", head: int | None = None, position: int | None = None
) -> go.Figure:
    """Draw what each patch does to the metric: a heatmap by layer and position or head, bars for one axis.

    Layer 0 is at the bottom. A grid by layer, head and position has a row for each head: the 40 with the
    largest effects, or those of one `head` or `position`. Effects are colored around 0: blue where the patch
    raises the metric, orange where it lowers it (which is worse for a loss, better for a logit difference).
    Cells that were not run are gray. A grid of at most 60 cells shows its numbers. A larger one shows those
    of its 5 largest effects if they fit (by position, one layer of each position). Hover for the numbers with
    their standard error. With several prompts, the axis has positions in place of tokens.

    Args:
        result: from a `Patching` method or an ablation. The figure of `attribution` says that it is an
            estimate.
        value: `effect`, the change in the metric; `mean`, the metric itself; `recovered`, the share of the
            way to the other run.
        head: draw only this head of each layer, for a grid by layer, head and position.
        position: draw only this position, for such a grid.

    Returns:
        A plotly figure.

    Raises:
        ValueError: an unknown `value`, a head or position that was not patched, a single cell, or a result
            without `recovered`.

    Example:
        >>> found = mechlens.Patching(model, "said Mr. Pickwick").grid("mlp_out", values="zero")
        >>> mechlens.plot_patch_grid(found).data[0].type
        'heatmap'
    """
    check_type("result", result, PatchGridResult, AttributionPatchResult)
    if value not in VALUES:
        raise ArgumentError("value", f"one of {', '.join(VALUES)}", value)
    if value == "recovered" and not result.has_recovered:
        raise ValueError(
            "recovered needs a corrupted run whose metric differs from the clean one, but there is none"
        )
    view = _View.of(result, value, head, position)
    if len(view.axes) == 1:
        figure, title = _bars(view), _title(view)
    else:
        figure, more = _cells(view)
        title = _title(view, more)
        figure.update_layout(height=figure.layout.height + top_margin(title))
    figure.update_layout(template=TEMPLATE, title_text=title, margin={"t": top_margin(title)})
    return figure


def plot_head_effects(result: Patches, *, top: int = 15, position: int | None = None) -> go.Figure:
    """Draw the heads with the largest effects, either way, as bars with their standard errors.

    Args:
        top: number of heads, at least 1.
        position: the position to draw, for a grid by layer, head and position.

    Returns:
        A plotly figure.

    Raises:
        ValueError: the result is not by head, no position was chosen, or `top` is below 1.

    Example:
        >>> heads = mechlens.ablate_heads(model, on=mechlens.RepeatedTokens(8, batch=1, seeds=[0]))
        >>> figure = mechlens.plot_head_effects(heads, top=5)
    """
    check_type("result", result, PatchGridResult, AttributionPatchResult)
    check_counts(top=top)
    if "head" not in result.axes:
        raise ValueError(f"this result is by {' and '.join(result.axes)}, not by head")
    if "pos" in result.axes and position is None:
        raise ValueError("this result is also by position: choose position=")
    view = _View.of(result, "effect", None, position)
    effect, error, hovers = view.values("effect"), view.values("standard_error"), _hovers(view)
    cells = [
        (float(effect[row, column]), row, column) for row, column in (~effect.isnan()).nonzero().tolist()
    ]
    known = sorted(cells, key=lambda cell: -abs(cell[0]))[:top]
    title = _title(view, f"the {len(known)} largest of {len(result.heads)} heads")
    layers, heads = view.labels
    figure = go.Figure(
        go.Bar(
            name="effect",
            orientation="h",
            x=[value for value, _, _ in known],
            y=[head_label(layers[row], heads[column]) for _, row, column in known],
            marker={"color": [BLUE if value >= 0 else VERMILION for value, _, _ in known]},
            # a single prompt has no standard error
            error_x={
                "visible": len(result.tokens) > 1,
                "array": [float(error[row, column]) for _, row, column in known],
                **_ERROR_BAR,
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
        xaxis={"title": {"text": _axis_title(view)}, "zeroline": True, "zerolinecolor": MUTED},
        # Categories, because plotly would read labels such as `1E5` as numbers.
        yaxis={"type": "category", "autorange": "reversed", "ticks": "", "gridcolor": GRID},
    )
    return figure


# -- parts -----------------------------------------------------------------------------------------

_ERROR_BAR = {"type": "data", "color": INK, "thickness": 1.5, "width": 5}


@dataclasses.dataclass(frozen=True, eq=False)
class _View:
    """The part of a result that is drawn: one or two axes, or every head of every layer by position."""

    result: Patches
    value: str
    head: int | None
    position: int | None
    axes: tuple[str, ...]
    index: tuple[int | slice, ...]
    """Selects the axes that are drawn from the grid."""

    @classmethod
    def of(cls, result: Patches, value: str, head: int | None, position: int | None) -> _View:
        index: list[int | slice] = [slice(None)] * len(result.axes)
        for axis, name, wanted in (("head", "head", head), ("pos", "position", position)):
            if wanted is None:
                continue
            if axis not in result.axes:
                raise ValueError(f"this result is by {' and '.join(result.axes)}: leave out {name}")
            known = result.labels(axis)
            if wanted not in known:
                patched = ", ".join(map(str, known))
                raise ValueError(f"{name} {wanted} was not patched: the patches cover {patched}")
            index[result.axes.index(axis)] = known.index(wanted)
        axes = tuple(axis for axis, at in zip(result.axes, index, strict=True) if isinstance(at, slice))
        if not axes:
            raise ValueError("this result is a single cell: read its .effect")
        return cls(result, value, head, position, axes, tuple(index))

    @property
    def labels(self) -> list[tuple[Any, ...]]:
        """The rows, which are heads as (layer, head) if three axes are drawn, and the columns."""
        labels = [self.result.labels(axis) for axis in self.axes]
        if len(labels) < 3:
            return labels
        heads = list(itertools.product(*labels[:2]))
        return [tuple(heads[row] for row in self.strongest), labels[2]]

    @functools.cached_property
    def strongest(self) -> list[int]:
        """The heads to draw if three axes are drawn, in order of layers."""
        return strongest_heads(self.result.effect.flatten(0, 1))[0]

    @property
    def one_prompt(self) -> bool:
        return len(self.result.tokens) == 1

    def values(self, name: str) -> Float[Tensor, "*drawn"]:
        found: Tensor = getattr(self.result, name)[self.index]
        if len(self.axes) == 3:
            found = found.flatten(0, 1)[self.strongest]
        return found.double().cpu()

    def cell(self, *labels: Any) -> tuple[int | None, int | None, int | None]:
        """Layer, head and position of a cell that is drawn."""
        if len(self.axes) == 3:
            labels = (*labels[0], labels[1])
        named = {"head": self.head, "pos": self.position} | dict(zip(self.axes, labels, strict=True))
        return named.get("layer"), named["head"], named["pos"]

    def token(self, position: int, longest: int | None = None) -> str:
        return visible_token(self.result.strings[position], longest=longest)


def _cells(view: _View) -> tuple[go.Figure, str]:
    """A heatmap of two axes, with a height that excludes the title, and its largest effects in words."""
    values, across = view.values(view.value), _across(view)
    rows, columns = view.labels
    largest = _largest(view)
    drawn = _heatmap(values, view.value, _hovers(view))
    if across["width"] - 140 >= _ROOM * values.shape[1]:
        few = values.numel() <= _WRITTEN
        texts = _texts(values, None if few else largest)
        drawn.update(text=texts, texttemplate="%{text}", textfont={"size": 12 if few else 10})
    figure = go.Figure(drawn)
    by_head = len(view.axes) == 3
    ticks = _ticks([head_label(*row) if by_head else str(row) for row in rows], len(rows) if by_head else 32)
    figure.update_layout(
        **across,
        height=(110 if view.axes[-1] == "pos" else 60)
        + len(rows) * (52 if len(rows) <= 4 else 30 if len(rows) <= 12 else 16),
        yaxis={"title": {"text": "head" if by_head else view.axes[0]}, **ticks, **NO_TICKS},
        # shows through cells without a value
        plot_bgcolor=ABSENT if bool(values.isnan().any()) else "white",
    )
    named = []
    for row, column in largest[:3]:
        cell = view.cell(rows[row], columns[column])
        token = "" if cell[2] is None or not view.one_prompt else f" {view.token(cell[2], _LABEL)}"
        named.append(f"{cell_label(*cell)}{token} {number(float(values[row, column]), 2)}")
    words = "largest by position" if view.axes[1] == "pos" else "largest effects"
    found = f"{words}: {', '.join(named)}" if named else "no effects"
    some = strongest_heads(view.result.effect.flatten(0, 1))[1] if by_head else ""
    return figure, f"{some}; {found}" if some else found


def _heatmap(values: Tensor, value: str, hovers: list[list[str]]) -> go.Heatmap:
    known = values[~values.isnan()]
    high = float(known.abs().max()) if known.numel() else 0.0
    high = max(high, 1.0 if value == "recovered" else 1e-6)
    # values that cannot be negative, such as losses, need only one half of the scale
    low = 0.0 if value == "mean" and bool((known >= 0).all()) else -high
    drawn = heatmap(values.numpy(), low=low, high=high, hovers=hovers, name=value, xgap=1, ygap=1)
    drawn.colorbar.update(tickformat=".3~g")
    return drawn


def _largest(view: _View) -> list[tuple[int, int]]:
    """The cells of the largest drawn effects, largest first. Of each position, only the largest, because its
    layers are much alike."""
    effect = view.values("effect").abs().nan_to_num(0)
    layers, columns = effect.nonzero().T.tolist()
    if view.axes[1] == "pos":
        columns = effect.any(0).nonzero()[:, 0].tolist()
        layers = effect.argmax(0)[columns].tolist()
    places = list(zip(layers, columns, strict=True))
    return sorted(places, key=lambda place: -float(effect[place]))[:_NAMED]


def _texts(values: Tensor, only: list[tuple[int, int]] | None) -> list[list[str]]:
    """The numbers of all cells, or of some, as text."""
    return [
        [
            number(value, 2) if value == value and (only is None or (row, column) in only) else ""
            for column, value in enumerate(line)
        ]
        for row, line in enumerate(values.tolist())
    ]


def _bars(view: _View) -> go.Figure:
    values, (labels,) = view.values(view.value), view.labels
    colors = [BLUE if each >= 0 else VERMILION for each in values.tolist()]
    bars = go.Bar(
        name=view.value,
        x=[str(label) for label in labels],
        y=values.tolist(),
        marker={"color": colors if view.value == "effect" else BLUE},
        hovertext=[row[0] for row in _hovers(view)],
        hoverinfo="text",
    )
    if view.value == "effect" and not view.one_prompt:
        bars.error_y = {"array": view.values("standard_error").tolist(), **_ERROR_BAR}
    figure = go.Figure(bars)
    figure.update_layout(
        width=max(520, min(WIDTH, 260 + 36 * len(labels))),
        height=430,
        bargap=0.3,
        xaxis={
            "type": "category",
            "title": {"text": "patched position" if view.axes == ("pos",) else "layer"},
            **NO_TICKS,
        },
        yaxis={"title": {"text": _axis_title(view)}, "zeroline": True, "zerolinecolor": MUTED},
    )
    return figure


def _across(view: _View) -> dict[str, Any]:
    """Width and horizontal axis of a heatmap."""
    labels = view.labels[1]
    if view.axes[-1] == "head":
        return {
            "width": max(640, min(WIDTH, 170 + len(labels) * (56 if len(labels) <= 12 else 28))),
            "xaxis": {"title": {"text": "head"}, **_ticks([str(head) for head in labels], 32), **NO_TICKS},
        }
    texts = [str(at) if not view.one_prompt else figure_text(view.token(at, _LABEL)) for at in labels]
    begins = turns(view.result.strings) if view.one_prompt else {}
    texts = [
        f"<b>{begins[at]}</b> {text}" if at in begins else text
        for at, text in zip(labels, texts, strict=True)
    ]
    return {
        "width": max(620, min(WIDTH, 150 + len(labels) * (40 if len(labels) <= 16 else 18))),
        "xaxis": {
            "title": {"text": "patched token" if view.one_prompt else "patched position"},
            **_ticks(texts, 64 if view.one_prompt else 26),
            "tickangle": -90 if view.one_prompt else 0,
            **NO_TICKS,
        },
    }


def _ticks(labels: list[str], most: int) -> dict[str, object]:
    step = max(1, math.ceil(len(labels) / most))
    return {"tickvals": list(range(0, len(labels), step)), "ticktext": labels[::step]}


def _hovers(view: _View) -> list[list[str]]:
    """The hover texts by the first and second axis; one column if there is no second."""
    result = view.result
    rows = view.labels[0]
    columns: list[tuple[int, ...]] = [(label,) for label in view.labels[1]] if len(view.axes) > 1 else [()]
    names = ("effect", "standard_error", "mean", "recovered")
    parts = [view.values(name).reshape(len(rows), -1).tolist() for name in names]
    metric, base = figure_text(result.metric), number(float(result.base.mean()))

    def text(row: int, column: int) -> str:
        layer, head, at = view.cell(rows[row], *columns[column])
        place = "all layers" if layer is None else f"layer {layer}"
        found = f"<b>{place if head is None or layer is None else head_label(layer, head)}</b>"
        if at is not None:
            found += f"<br>position {at}"
            found += f": {figure_text(view.token(at))}" if view.one_prompt else ""
        effect, error, mean, recovered = (part[row][column] for part in parts)
        found += f"<br>{metric} changes by {_signed(effect)} {result.unit}".rstrip()
        found += "" if error != error else f"<br>standard error {number(error)}"
        found += f"<br>patched {number(mean)}, without the patch {base}"
        return found + ("" if recovered != recovered else f"<br>recovered {number(recovered)}")

    return [[text(row, column) for column in range(len(columns))] for row in range(len(rows))]


def _signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)


def _axis_title(view: _View) -> str:
    result = view.result
    if view.value == "recovered":
        return _share(result)
    words = result.metric if view.value == "mean" else f"change in {result.metric}"
    words = f"estimated {words}" if isinstance(result, AttributionPatchResult) else words
    return f"{words} ({result.unit})" if result.unit else words


def _title(view: _View, more: str = "") -> str:
    result = view.result
    what = {
        "effect": f"Change in {result.metric}",
        "mean": result.metric.capitalize() if result.metric == "loss" else result.metric,
        "recovered": _share(result).capitalize(),
    }[view.value]
    unit = f" ({result.unit})" if result.unit and view.value != "recovered" else ""
    site = result.site if view.head is None else f"{result.site} of head {view.head}"
    site += "" if view.position is None else f" at position {view.position}"
    return titles(
        f"{what}{unit}, {site} patched",
        result.model.name,
        f"with: {result.put_there}; into the {result.into} run; {count(len(result.tokens), 'prompt')}",
        *([result.about_metric] if result.about or view.value == "recovered" else []),
        *([more] if more else []),
        *(["a first-order estimate"] if isinstance(result, AttributionPatchResult) else []),
    )


def _share(result: Patches) -> str:
    return f"share of the way to the {'clean' if result.into == 'corrupted' else 'corrupted'} run"
