"""Pictures of alignment: how often the same feature has the same best tokens in two layers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mechlens.plots.style import MUTED, TEMPLATE, figure_text, heatmap, number, titles
from mechlens.results import FeatureAlignment, Share

WORDS = {"same": "the same best token", "overlap": "the same best tokens"}
_WRITTEN = 12
"""Layers up to which each cell holds its number."""
_LETTERS = 36
"""In a line above or below one heatmap."""
_NO_TICKS = {"ticks": "", "showgrid": False, "ticklabelstandoff": 4}


def compared_names(result: FeatureAlignment) -> str:
    """Whose features are compared: `gpt2`, `gpt2 with gpt2-medium`, or `gpt2, attn_out with mlp_out`."""
    here, there = result.model.name, result.other.name
    if result.within:
        return here
    if here != there:
        return f"{here} with {there}"
    if result.site != result.other_site:
        return f"{here}, {result.site} with {result.other_site}"
    return f"{here} with another of its name"


def chance_words(share: Share) -> str:
    """Chance with enough digits, which in a large vocabulary is next to nothing."""
    return f"{share.chance:.2g}" if 0 < share.chance < 0.001 else number(share.chance)


def share_lines(share: Share) -> tuple[str, ...]:
    """A share with its interval, and chance with the verdict."""
    if math.isnan(share.value):
        return ("no two layers to compare",)
    return (
        f"{number(share.value)} ({number(share.low)} to {number(share.high)})",
        f"chance {chance_words(share)}" + (f": {share.verdict}" if share.verdict else ""),
    )


def result_names(results: Sequence[FeatureAlignment], names: Sequence[str] | None) -> list[str]:
    """What each comparison is called.

    Raises:
        ValueError: no result, or not as many names.
    """
    if not results:
        raise ValueError("there is nothing to show: give at least one result of feature_alignment")
    if names is None:
        return [compared_names(result) for result in results]
    if isinstance(names, str) or len(names) != len(results):
        given = f"the text {names!r}" if isinstance(names, str) else f"{len(names)}"
        raise ValueError(f"names must be {len(results)}, one for each result, but is {given}")
    return list(names)


def plot_feature_alignment(
    *results: FeatureAlignment, names: Sequence[str] | None = None, value: str = "same"
) -> go.Figure:
    """Draw how often features agree, layer by layer, one heatmap for each result beside the others.

    Colours span [0, 1] in all of them; layers go upwards and to the right. Above each stands the mean over
    pairs of layers, each with each later one or with itself in the other model, with its 95% interval, chance
    and verdict. Under the cursor stand these of the cell.

    Args:
        results: such as of a trained model and an untrained one.
        names: what they are called; None takes the models' names.
        value: `same`, the share of features with the same best token, or `overlap`, the share of the best
            tokens that are the same.

    Raises:
        ValueError: no result, not as many names, or another value.
    """
    called = result_names(results, names)
    if value not in WORDS:
        raise ValueError(f"value must be one of {', '.join(WORDS)}, but is {value!r}")
    figure = make_subplots(
        cols=len(results), horizontal_spacing=0.3 / len(results) if len(results) > 1 else 0
    )
    widest = lines = 0
    for at, (result, name) in enumerate(zip(results, called, strict=True), start=1):
        n_rows, n_columns = result.same.shape[:2]
        widest = max(widest, n_rows, n_columns)
        cells = heatmap(
            (result.same.double() if value == "same" else result.overlap.double()).mean(-1).cpu().numpy(),
            low=0.0,
            high=1.0,
            hovers=_hovers(result, value),
            name=figure_text(name),
            texttemplate="%{z:.2f}" if max(n_rows, n_columns) <= _WRITTEN else "",
            textfont={"size": 11 if max(n_rows, n_columns) <= 8 else 9},
            showscale=at == len(results),
            xgap=1,
            ygap=1,
        )
        figure.add_trace(cells, row=1, col=at)
        sides = (("x", result.other_layers, result.within), ("y", result.layers, True))
        for axis, layers, own in sides:
            step = max(1, math.ceil(len(layers) / 16))
            getattr(figure, f"update_{axis}axes")(
                title={"text": "layer" if own else _wrapped(f"layer of {result.other.name}")[0]},
                tickvals=list(range(0, len(layers), step)),
                ticktext=[str(layer) for layer in layers[::step]],
                **_NO_TICKS,
                row=1,
                col=at,
            )
        axes = figure.layout[f"xaxis{at if at > 1 else ''}"]
        heading, n_lines = _wrapped(name)
        lines = max(lines, n_lines)
        summary = "<br>".join(share_lines(result.share(value)))
        figure.add_annotation(
            x=axes.domain[0],
            y=1,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="bottom",
            align="left",
            showarrow=False,
            text=f'<b>{heading}</b><br><span style="color:{MUTED}">{summary}</span>',
        )
    side = max(230, min(460, (34 if widest <= _WRITTEN else 18) * widest))
    features = sorted({len(result.features) for result in results})
    tops = sorted({result.top_k for result in results})
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(
            "Share of features with the same best token in two layers"
            if value == "same"
            else f"Share of the {' or '.join(map(str, tops))} best tokens that two layers share",
            f"0 to 1, of {' or '.join(f'{n:,}' for n in features)} features; above: mean over pairs of "
            "layers (95% interval)",
        ),
        width=max(480, 150 + round(side * 1.35 * len(results))),
        height=side + 202 + 17 * lines,
        margin={"t": 132 + 17 * lines},
    )
    return figure


def _wrapped(text: str) -> tuple[str, int]:
    """A text made safe, in lines that do not reach the next heatmap, and how many they are."""
    lines = textwrap.wrap(text, _LETTERS) or [text]
    return "<br>".join(map(figure_text, lines)), len(lines)


def _hovers(result: FeatureAlignment, value: str) -> list[list[str]]:
    """What stands under the cursor, by layer and other layer."""
    table = result.to_dataframe()
    what = WORDS[value] if value == "same" else f"{WORDS[value]} of {result.top_k}"
    there = "" if result.within else f" of {figure_text(result.other.name)}"
    texts = []
    for row in table.to_dict("records"):
        one, other = row["layer"], row["other_layer"]
        share = Share(*(row[f"{value}{end}"] for end in ("", "_low", "_high", "_chance")))
        if result.within and one == other:
            texts.append(f"<b>layer {one}</b> with itself")
            continue
        texts.append(
            f"<b>layer {one} with layer {other}{there}</b><br>{what}: {number(share.value)}"
            f"<br>95% interval {number(share.low)} to {number(share.high)}"
            f"<br>by chance {chance_words(share)}" + (f"<br>{share.verdict}" if share.verdict else "")
        )
    n_columns = len(result.other_layers)
    return [texts[at : at + n_columns] for at in range(0, len(texts), n_columns)]
