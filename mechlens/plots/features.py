"""Figures of features: their maximally activating tokens and examples."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import torch

from mechlens.arguments import check_type
from mechlens.errors import ArgumentError
from mechlens.plots.circuitsvis import View
from mechlens.plots.style import NO_TICKS, TEMPLATE, WIDTH, figure_text, heatmap, titles, top_margin
from mechlens.results import ExhaustiveSearch, FeatureExamples
from mechlens.results.features import NO_TOKEN, listed, place_words
from mechlens.text.display import number, visible_token

ENDS = {"highest": "Maximally", "lowest": "Minimally"}
COLUMNS = 8
"""Features that are drawn by default."""
_LABEL = 14
_HOVERED = 10
# After `<` or `&`, most characters would begin markup or an entity; this invisible one does not.
_APART = "\N{WORD JOINER}"


def drawn_places(
    result: ExhaustiveSearch, layers: Sequence[int] | None, features: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """The layers and features to show: the chosen ones, each once, or all layers and the first features.

    Raises:
        ValueError: one was not searched, or none is chosen.
    """
    features = result.features[:COLUMNS] if features is None else features
    chosen = [list(dict.fromkeys(result.layers if layers is None else layers)), list(dict.fromkeys(features))]
    for name, wanted, known in zip(
        ("layer", result.noun), chosen, (result.layers, result.features), strict=True
    ):
        if not wanted:
            raise ValueError(f"no {name} is chosen: the search covers {listed(known)}")
    for layer, feature in [(chosen[0][0], each) for each in chosen[1]] + [
        (each, chosen[1][0]) for each in chosen[0]
    ]:
        result.at(layer, feature)
    return chosen[0], chosen[1]


def plot_feature_tokens(
    result: ExhaustiveSearch,
    *,
    layers: Sequence[int] | None = None,
    features: Sequence[int] | None = None,
    end: str = "highest",
) -> go.Figure:
    """Draw the maximally activating token of each feature, by layer (upwards) and feature.

    A feature is a basis dimension of an activation, or a direction in the residual stream. Colors show in how
    many of the drawn layers the feature has the same token: a dark column is aligned. Hover for the next
    best tokens and their activations. A dash means that no token activates the feature
    (`ExhaustiveSearch.activates`).

    Args:
        result: from `search_exhaustive`.
        layers: layer numbers to draw; None draws all that were searched.
        features: features to draw; None draws the first 8.
        end: `highest`, or `lowest` for the minimally activating tokens.

    Raises:
        ValueError: a layer or feature that was not searched, no layer or feature, or an unknown end.

    Example:
        >>> found = mechlens.search_exhaustive(raw, mechlens.Features(indices=range(8)), top_k=3)
        >>> figure = mechlens.plot_feature_tokens(found, layers=[0, 1])

    References: Badger, "Language Model Features", tables of "Complete Search Features", with layer 0 at
        the top.
    """
    check_type("result", result, ExhaustiveSearch)
    if end not in ENDS:
        raise ArgumentError("end", f"one of {', '.join(ENDS)}", end)
    layers, features = drawn_places(result, layers, features)
    rows = torch.tensor([result.layers.index(layer) for layer in layers])
    columns = torch.tensor([result.features.index(feature) for feature in features])
    highest = end == "highest"
    ids = (result.ids if highest else result.lowest_ids).cpu()[rows][:, columns]
    activations = (result.activations if highest else result.lowest_activations).cpu()[rows][:, columns]
    activates = torch.ones_like(ids, dtype=torch.bool)
    if highest:
        activates = result.activates.cpu()[rows][:, columns]
    # a feature that no token activates has no token to share
    best, some = ids[..., 0], activates[..., 0]
    shared = ((best[None] == best[:, None]) & some[None]).sum(1).clamp(min=1)
    shared[~some] = 1
    noun = result.noun
    # letters are somewhat wider than half their height
    longest = max(4, min(_LABEL, int(((WIDTH - 170) / len(features) - 24) / 7.2) - 1))
    hovers, texts = [], []
    for i, layer in enumerate(layers):
        hovers.append(
            [
                f"<b>layer {layer}, {noun} {feature}</b><br>"
                + (
                    _best_tokens(
                        ids[i, j][activates[i, j]].tolist(), activations[i, j].tolist(), result.strings
                    )
                    + (f"<br>first in {int(shared[i, j])} of {len(layers)} layers" if len(layers) > 1 else "")
                    if some[i, j]
                    else "no token activates it"
                )
                for j, feature in enumerate(features)
            ]
        )
        texts.append(
            [
                visible_token(result.strings[str(token)], longest=longest) if active else NO_TOKEN
                for token, active in zip(best[i].tolist(), some[i].tolist(), strict=True)
            ]
        )
    # a single layer has nothing to agree with: all its cells are light
    cells = heatmap(
        shared.numpy(),
        low=1.0,
        high=float(max(2, len(layers))),
        hovers=hovers,
        name=end,
        text=[[figure_text(text) for text in line] for line in texts],
        texttemplate="%{text}",
        textfont={"size": 12},
        showscale=len(layers) > 1,
        xgap=2,
        ygap=2,
    )
    counts = list(range(1, len(layers) + 1, max(1, len(layers) // 4)))
    cells.colorbar.update(tickvals=counts, ticktext=[f"{count} of {len(layers)}" for count in counts])
    figure = go.Figure(cells)
    widest = max(map(len, (text for line in texts for text in line)))
    row_height = 34 if len(layers) <= 16 else 24
    title = titles(
        f"{ENDS[end]} activating token of each {noun} of {place_words(result.site)}",
        result.model.name,
        f"of all {result.model.d_vocab:,} tokens, each {result.begins}",
        *(["darker where more layers have the same token"] if len(layers) > 1 else []),
    )
    figure.update_layout(
        template=TEMPLATE,
        title_text=title,
        width=max(560, 170 + int(len(features) * (24 + 7.2 * max(widest, 4)))),
        height=top_margin(title) + 66 + row_height * len(layers),
        margin={"t": top_margin(title)},
        xaxis={
            "title": {"text": noun},
            "tickvals": list(range(len(features))),
            "ticktext": [str(feature) for feature in features],
            **NO_TICKS,
        },
        yaxis={
            "title": {"text": "layer"},
            "tickvals": list(range(len(layers))),
            "ticktext": [str(layer) for layer in layers],
            **NO_TICKS,
        },
    )
    return figure


def plot_feature_examples(result: FeatureExamples, layer: int, feature: int) -> View:
    """Show the maximally activating examples of a feature, each token shaded by its activation.

    A feature is a basis dimension of an activation, or a direction in the residual stream. Blue is above 0,
    red below, on one scale for all windows. BOS, whose activation does not count, is white. Jupyter shows the
    view offline; `.write_html("examples.html")` saves it as a page.

    Args:
        result: from `feature_examples`.
        layer: a layer that was searched.
        feature: a feature that was searched.

    Raises:
        ValueError: the layer or feature was not searched, or no window was read.

    Example:
        >>> texts = ["The captain of the ship looked at the sea, and the sea looked at the captain."]
        >>> found = mechlens.feature_examples(raw, mechlens.Features(2, 7), texts, length=8)
        >>> view = mechlens.plot_feature_examples(found, 2, 7)
    """
    check_type("result", result, FeatureExamples)
    i, j = result.at(layer, feature)
    rows = result.windows[i, j].tolist()
    kept = [rank for rank, row in enumerate(rows) if row >= 0]
    if not kept:
        raise ValueError("nothing to show: no window was read")
    tokens = [[result.strings[str(token)] for token in result.tokens[rows[rank]].tolist()] for rank in kept]
    # JSON has no nan, and more digits are noise under the cursor
    activations = [
        [float(f"{value:.4g}") for value in result.activations[i, j, rank].double().nan_to_num(0).tolist()]
        for rank in kept
    ]
    # The component scales blue to the largest and red to the smallest of all numbers, however near 0 that is.
    # Two extra numbers after each window's last token, which are not drawn, make both scales equal.
    largest = max(abs(value) for window in activations for value in window) or 1.0
    activations = [[*window, largest, -largest] for window in activations]
    return View(
        "TopkSamples",
        {
            "tokens": [[[[_no_markup(visible_token(token)) for token in window] for window in tokens]]],
            "activations": [[activations]],
            "zerothDimensionName": "Layer",
            "zerothDimensionLabels": [str(layer)],
            "firstDimensionName": result.noun.capitalize(),
            "firstDimensionLabels": [str(feature)],
        },
    )


def _best_tokens(ids: list[int], activations: list[float], strings: dict[str, str]) -> str:
    """The first tokens with their activations, one per line."""
    lines = [
        f"{rank}. {figure_text(visible_token(strings[str(token)]))} {number(value)}"
        for rank, (token, value) in enumerate(zip(ids, activations, strict=False), start=1)
    ]
    return "<br>".join(lines[:_HOVERED])


def _no_markup(token: str) -> str:
    """A token that remains text in circuitsvis, which puts tokens into the page as markup.

    Entities would work in the text, but hover texts show them literally.
    """
    return token.replace("<", f"<{_APART}").replace("&", f"&{_APART}")
