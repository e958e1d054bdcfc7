"""Pictures of alignment: how often the same feature has the same best tokens in two layers."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from mechlens.arguments import check_type
from mechlens.plots.style import GRID, MUTED, TEMPLATE, figure_text, heatmap, titles
from mechlens.results import FeatureAlignment, Share
from mechlens.results.feature_alignment import CHANCE
from mechlens.text.display import number

WORDS = {"same": "the same best token", "overlap": "the same best tokens"}
_WRITTEN = 12
"""Layers up to which each cell holds its number."""
_LETTERS = 36
"""In a line above or below one heatmap."""
_SIDES = {1: 460, 2: 340, 3: 230}
"""The longest side of a heatmap by how many stand in a row, with which the row fits a page; in pixels."""
_LINE = 17
"""Height of a line of text, in pixels."""
_NO_TICKS = {"ticks": "", "showgrid": False, "ticklabelstandoff": 4}


def site_words(result: FeatureAlignment) -> str:
    """Where features are read: `mlp_out`, or `attn_out with mlp_out`."""
    same = result.site == result.other_site
    return result.site if same else f"{result.site} with {result.other_site}"


def index_shares(results: Iterable[FeatureAlignment]) -> dict[str, Share]:
    """How often a best token's id is the feature's number, by whose features they are, each once.

    Directions, whose numbers mean nothing, are not among them.
    """
    shares = {name: result.index_share(other) for name, (result, other) in _sides(results).items()}
    return {name: share for name, share in shares.items() if share.value == share.value}


def left_out(results: Iterable[FeatureAlignment]) -> dict[str, list[int]]:
    """How many features no token excites, by layer, by whose features they are, each once; without those of
    which tokens excite all."""
    counts = {
        name: (~(result.other_excited if other else result.excited)).sum(-1).tolist()
        for name, (result, other) in _sides(results).items()
    }
    return {name: layers for name, layers in counts.items() if any(layers)}


def left_out_words(results: Sequence[FeatureAlignment]) -> str:
    """The same as a sentence; empty where none are."""
    sides, counts = _sides(results), []
    for name, layers in left_out(results).items():
        fewest, most = min(layers), max(layers)
        count = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
        features = len(sides[name][0].features)
        counts.append(f"{count} of {features:,} in {'each' if fewest == most else 'a'} layer of {name}")
    if not counts:
        return ""
    return f"Features that no token excites have no best token and are left out: {'; '.join(counts)}."


def _sides(results: Iterable[FeatureAlignment]) -> dict[str, tuple[FeatureAlignment, bool]]:
    """Whose features are compared, each once, with a result that has them and whether as the other's."""
    results = list(results)
    several = len({site for each in results for site in (each.site, each.other_site)}) > 1
    found: dict[str, tuple[FeatureAlignment, bool]] = {}
    for result in results:
        sides = [(result.model.name, result.site, False)]
        if not result.within:
            # of another directory, perhaps, with the same last part
            alike = (result.other, result.other_site) == (result.model, result.site)
            name = f"the other {result.other.name}" if alike else result.other.name
            sides.append((name, result.other_site, True))
        for name, site, other in sides:
            found.setdefault(f"{name}, {site}" if several else name, (result, other))
    return found


def index_verdict(share: Share) -> str:
    """More of them than chance has would not make features aligned."""
    return "more than chance" if share.low > share.chance else CHANCE


def chance_words(share: Share) -> str:
    """Chance with enough digits, which in a large vocabulary is next to nothing."""
    return f"{share.chance:.2g}" if 0 < share.chance < 0.001 else number(share.chance)


def share_lines(share: Share) -> tuple[str, ...]:
    """A share with its interval, and chance with the verdict."""
    if math.isnan(share.value):
        return ("nothing to compare",)
    return (
        f"{number(share.value)} ({number(share.low)} to {number(share.high)})",
        f"chance {chance_words(share)}" + (f": {share.verdict}" if share.verdict else ""),
    )


def result_names(results: Sequence[FeatureAlignment], names: Sequence[str] | None) -> list[str]:
    """What each comparison is called: as given or by its models, and with its sites where these differ.

    Raises:
        ValueError: no result, or not as many names.
    """
    if not results:
        raise ValueError("there is nothing to show: give at least one result of feature_alignment")
    if names is None:
        names = [_models(result) for result in results]
    if isinstance(names, str) or len(names) != len(results):
        given = f"the text {names!r}" if isinstance(names, str) else f"{len(names)}"
        raise ValueError(f"names must be {len(results)}, one for each result, but is {given}")
    sites = [site_words(result) for result in results]
    several = len(set(sites)) > 1
    return [
        f"{name}, {words}"
        if (several or " with " in words) and not re.search(rf"\b{words}\b", name)
        else name
        for name, words in zip(names, sites, strict=True)
    ]


def plot_feature_alignment(
    *results: FeatureAlignment, names: Sequence[str] | None = None, what: str = "same"
) -> go.Figure:
    """Draw how often features agree, layer by layer, one heatmap for each result, up to three in a row.

    Colours span [0, 1] in all of them; layers go upwards and to the right. A layer with itself, within one
    search, says nothing and is left grey. Above each heatmap stands the mean over pairs of layers, each with
    each later one or with itself in the other model, with its 95% interval, chance and verdict. Under the
    cursor stand these of the cell.

    Args:
        results: such as of a trained model and an untrained one.
        names: what they are called; None takes the models' names.
        what: `same`, the share of features with the same best token, or `overlap`, the share of the best
            tokens that are the same.

    Raises:
        ValueError: no result, not as many names, or another share.
    """
    for result in results:
        check_type("result", result, FeatureAlignment)
    called = result_names(results, names)
    if what not in WORDS:
        raise ValueError(f"what must be one of {', '.join(WORDS)}, but is {what!r}")
    widest = max(max(result.same.shape[:2]) for result in results)
    wanted = max(230, (34 if widest <= _WRITTEN else 18) * widest)
    # three in a row where their numbers fit into the cells; as many in each row as can be
    most = 3 if wanted <= _SIDES[3] + 8 else 2
    n_rows = math.ceil(len(results) / most)
    n_columns = math.ceil(len(results) / n_rows)
    side = min(wanted, _SIDES[n_columns])
    headings = [_wrapped(name) for name in called]
    # the name, the share with its interval, chance with the verdict
    above = 12 + _LINE * (max(lines for _, lines in headings) + 2)
    # between two rows: the axis below the one and what stands above the other
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
        # beside the first row, however many there are
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
                **_NO_TICKS,
                **place,
            )
        axis_x, axis_y = (figure.layout[f"{axis}axis{at + 1 if at else ''}"] for axis in "xy")
        summary = "<br>".join(share_lines(result.share(what)))
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
        # the title is no narrower
        width=max(600, 150 + round(side * 1.35 * n_columns)),
        height=inner + 122 + _LINE + above,
        margin={"t": 52 + above, "b": 70 + _LINE},
        # of a layer with itself
        plot_bgcolor=GRID,
    )
    return figure


def _of_other(result: FeatureAlignment) -> str:
    """Whose the other layers are, where it is another model."""
    here, there = result.model.name, result.other.name
    if result.within or (here == there and result.site != result.other_site):
        return ""
    return f" of {there}" if here != there else f" of the other {there}"


def _models(result: FeatureAlignment) -> str:
    """Whose features are compared: `gpt2`, or `gpt2 with gpt2-medium`."""
    here, there = result.model.name, result.other.name
    if result.within or (here == there and result.site != result.other_site):
        return here
    return f"{here} with {there}" if here != there else f"{here} with another of its name"


def _means(result: FeatureAlignment, what: str) -> np.ndarray:
    """Mean over features that count, by layer and other layer; nan where there are none, and for a layer with
    itself within one search."""
    values, counted = (result.same if what == "same" else result.overlap), result.compared
    means = values.double().where(counted, torch.nan).nanmean(-1).cpu().numpy()
    if result.within:
        own = np.array(result.layers)[:, None] == np.array(result.other_layers)
        means = np.where(own, np.nan, means)
    return means


def _wrapped(text: str) -> tuple[str, int]:
    """A text made safe, in lines that do not reach the next heatmap, and how many they are."""
    lines = textwrap.wrap(text, _LETTERS) or [text]
    return "<br>".join(map(figure_text, lines)), len(lines)


def _hovers(result: FeatureAlignment, what: str) -> list[list[str]]:
    """What stands under the cursor, by layer and other layer."""
    words = WORDS[what] if what == "same" else f"{WORDS[what]} of {result.top_k}"
    here = f" ({result.site})" if result.site != result.other_site else ""
    there = figure_text(_of_other(result)) + (f" ({result.other_site})" if here else "")
    n_compared = result.compared.sum(-1).tolist()

    def hover(i: int, j: int) -> str:
        one, other, n = result.layers[i], result.other_layers[j], n_compared[i][j]
        if result.within and one == other:
            return ""
        share = result.share(what, [(one, other)])
        few = "" if n == len(result.features) else f"<br>of {n:,} features that tokens excite in both"
        return (
            f"<b>layer {one}{here} with layer {other}{there}</b><br>{words}: {number(share.value)}"
            f"<br>95% interval {number(share.low)} to {number(share.high)}"
            f"<br>by chance {chance_words(share)}{few}" + (f"<br>{share.verdict}" if share.verdict else "")
        )

    return [[hover(i, j) for j in range(len(result.other_layers))] for i in range(len(result.layers))]
