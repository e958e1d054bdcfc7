"""Figure of feature alignment: how often features have the same best tokens in two layers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from mechlens.arguments import check_type
from mechlens.errors import ArgumentError
from mechlens.plots.style import GRID, MUTED, NO_TICKS, TEMPLATE, figure_text, heatmap, titles
from mechlens.results import FeatureAlignment
from mechlens.results.feature_alignment import SHARES, Share, left_out, result_names
from mechlens.text.display import number

_WRITTEN = 12
"""Up to this many layers each cell shows its number."""
_LETTERS = 36
"""Characters in a line above or below one heatmap."""
_SIDES = {1: 460, 2: 340, 3: 230}
"""The longest side of a heatmap in pixels, by the number in a row, so that the row fits a page."""
_LINE = 17
"""Height of a line of text, in pixels."""


def plot_feature_alignment(
    *results: FeatureAlignment, names: Sequence[str] | None = None, what: str = "same"
) -> go.Figure:
    """Draw how often features have the same best tokens in each pair of layers, one heatmap for each result.

    A feature is a basis dimension of an activation, or a direction in the residual stream. Colors span [0, 1]
    in all heatmaps; layers go upwards and to the right. A layer with itself, within one search, is gray.
    Above each heatmap is the mean over `FeatureAlignment.pairs()`, with its 95% interval, chance and verdict.
    Hover over a cell for the same numbers.

    Args:
        results: for example, from a trained model and from random weights.
        names: a name for each; None takes the models' names.
        what: `same`, the share of features with the same best token, or `overlap`, the share of the best
            tokens that are the same.

    Raises:
        ValueError: no results, a different number of names, or an unknown share.

    Example:
        >>> search = mechlens.search_exhaustive(raw, mechlens.Features(indices=range(32)), top_k=2)
        >>> figure = mechlens.plot_feature_alignment(mechlens.feature_alignment(search))
    """
    for result in results:
        check_type("result", result, FeatureAlignment)
    called = result_names(results, names)
    if what not in SHARES:
        raise ArgumentError("what", f"one of {', '.join(SHARES)}", what)
    widest = max(max(result.same.shape[:2]) for result in results)
    wanted = max(230, (34 if widest <= _WRITTEN else 18) * widest)
    # three in a row if numbers fit into the cells, and rows of about equal length
    most = 3 if wanted <= _SIDES[3] + 8 else 2
    n_rows = math.ceil(len(results) / most)
    n_columns = math.ceil(len(results) / n_rows)
    side = min(wanted, _SIDES[n_columns])
    headings = [_wrapped(name) for name in called]
    # the name, the share with its interval, chance with the verdict
    above = 12 + _LINE * (max(lines for _, lines in headings) + 2)
    # between two rows: the axis of one and the text above the other
    apart = 56 + _LINE + above
    inner = n_rows * side + (n_rows - 1) * apart
    figure = make_subplots(
        rows=n_rows,
        cols=n_columns,
        horizontal_spacing=0.3 / n_columns if n_columns > 1 else 0,
        vertical_spacing=apart / inner if n_rows > 1 else 0,
    )
    for at, (result, (heading, _)) in enumerate(zip(results, headings, strict=True)):
        place = {"row": at // n_columns + 1, "col": at % n_columns + 1}
        size = max(result.same.shape[:2])
        cells = heatmap(
            _means(result, what),
            low=0.0,
            high=1.0,
            hovers=_hovers(result, what),
            name=figure_text(called[at]),
            texttemplate="%{z:.2f}" if size <= _WRITTEN else "",
            textfont={"size": 11 if size <= 8 else 9},
            showscale=at == 0,
            xgap=1,
            ygap=1,
        )
        # next to the first row, however many there are
        cells.colorbar.update(lenmode="pixels", len=side, y=1, yanchor="top")
        figure.add_trace(cells, **place)
        differ = result.site != result.other_site
        sides = (
            ("x", result.other_layers, result.other_site, _of_other(result)),
            ("y", result.layers, result.site, ""),
        )
        for axis, layers, site, whose in sides:
            step = max(1, math.ceil(len(layers) / 16))
            getattr(figure, f"update_{axis}axes")(
                title={"text": _wrapped(f"layer{whose}" + (f" ({site})" if differ else ""))[0]},
                tickvals=list(range(0, len(layers), step)),
                ticktext=[str(layer) for layer in layers[::step]],
                **NO_TICKS,
                **place,
            )
        axis_x, axis_y = (figure.layout[f"{axis}axis{at + 1 if at else ''}"] for axis in "xy")
        summary = "<br>".join(_lines(result.share(what)))
        figure.add_annotation(
            x=axis_x.domain[0],
            y=axis_y.domain[1],
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="bottom",
            align="left",
            showarrow=False,
            text=f'<b>{heading}</b><br><span style="color:{MUTED}">{summary}</span>',
        )
    features = sorted({len(result.features) for result in results})
    tops = sorted({result.top_k for result in results})
    most_of = "up to " if left_out(results) else ""
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(
            "Share of features with the same best token in two layers"
            if what == "same"
            else f"Share of the {' or '.join(map(str, tops))} best tokens that two layers share",
            f"0 to 1, of {most_of}{' or '.join(f'{n:,}' for n in features)} "
            f"feature{'' if features == [1] else 's'}; above: mean over pairs of layers (95% interval)",
        ),
        # wide enough for the title
        width=max(600, 150 + round(side * 1.35 * n_columns)),
        height=inner + 122 + _LINE + above,
        margin={"t": 52 + above, "b": 70 + _LINE},
        # cells of a layer with itself
        plot_bgcolor=GRID,
    )
    return figure


def _lines(share: Share) -> list[str]:
    """A share with its interval, and chance with the verdict."""
    if math.isnan(share.value):
        return [share.text]
    return [share.text, f"chance {share.chance_text}" + (f": {share.verdict}" if share.verdict else "")]


def _of_other(result: FeatureAlignment) -> str:
    """The model of the other layers, if it is a different one."""
    here, there = result.model.name, result.other.name
    if result.one_model:
        return ""
    return f" of {there}" if here != there else f" of the other {there}"


def _means(result: FeatureAlignment, what: str) -> np.ndarray:
    """Mean over the features that count, by layer and other layer; nan if there are none, and for a layer
    with itself within one search."""
    values, counted = (result.same if what == "same" else result.overlap), result.compared
    means = values.double().where(counted, torch.nan).nanmean(-1).cpu().numpy()
    if result.within:
        own = np.array(result.layers)[:, None] == np.array(result.other_layers)
        means = np.where(own, np.nan, means)
    return means


def _wrapped(text: str) -> tuple[str, int]:
    """An escaped text in lines that do not reach the next heatmap, and the number of lines."""
    lines = textwrap.wrap(text, _LETTERS) or [text]
    return "<br>".join(map(figure_text, lines)), len(lines)


def _hovers(result: FeatureAlignment, what: str) -> list[list[str]]:
    """Hover texts, by layer and other layer."""
    words = SHARES[what] if what == "same" else f"{SHARES[what]} of {result.top_k}"
    here = f" ({result.site})" if result.site != result.other_site else ""
    there = figure_text(_of_other(result)) + (f" ({result.other_site})" if here else "")
    n_compared = result.compared.sum(-1).tolist()

    def hover(i: int, j: int) -> str:
        one, other, n = result.layers[i], result.other_layers[j], n_compared[i][j]
        if result.within and one == other:
            return ""
        share = result.share(what, [(one, other)])
        few = "" if n == len(result.features) else f"<br>of {n:,} features that tokens activate in both"
        return (
            f"<b>layer {one}{here} with layer {other}{there}</b><br>{words}: {number(share.value)}"
            f"<br>95% interval {number(share.low)} to {number(share.high)}"
            f"<br>by chance {share.chance_text}{few}" + (f"<br>{share.verdict}" if share.verdict else "")
        )

    return [[hover(i, j) for j in range(len(result.other_layers))] for i in range(len(result.layers))]
