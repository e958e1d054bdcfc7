"""Pictures of features: the tokens that excite them, how gradients found them, and where texts do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import plotly.graph_objects as go
import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.arguments import check_type
from mechlens.plots.circuitsvis import View
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
from mechlens.results import CompleteSearch, FeatureExamples, GradientSearch, GreedySearch
from mechlens.text.display import number, visible_token

ENDS = {"highest": "most", "lowest": "least"}
NO_TOKEN = "—"
"""In place of a token, where none excites the feature."""
COLUMNS = 8
"""Features that are drawn unasked."""
_LABEL = 14
_HOVERED = 10
_LONGEST_LIST = 4
_NO_TICKS = {"ticks": "", "showgrid": False, "ticklabelstandoff": 4}
_NOUNS = {"post": "neuron", "direction": "direction"}
_MARKS = {"pinv": ("diamond", VERMILION), "nearest": ("square", INK)}
_PLACES = {"direction": "resid_post", "post": "the MLP"}
EXCITING = ("constant", "maximise", "maximin")
"""The objectives that make activations large."""
_DISTANCES = {
    "l1": "L1 distance to the target's activations",
    "cosine": "cosine distance to the target's activations",
}
# A letter or a sign after them would begin markup or an entity; this one, which is not seen, does not.
_APART = "\N{WORD JOINER}"


def feature_noun(site: str) -> str:
    """What one element of an activation is called: `feature`, `neuron` or `direction`."""
    return _NOUNS.get(site, "feature")


def place_words(site: str, layer: int | None = None) -> str:
    """Where features are read, behind their noun: a direction is one of `resid_post`, a neuron one of the
    MLP."""
    name = _PLACES.get(site, site)
    return name if layer is None else f"{name} of layer {layer}"


def prefix_words(result: CompleteSearch | GreedySearch | GradientSearch) -> str:
    """What the inputs begin with, for a title: `behind <s>`, or `without BOS` where there is nothing."""
    if not len(result.prefix):
        return "without BOS"
    return f"behind {shown_tokens(result.prefix, result.strings)}"


def shown_tokens(ids: Int[Tensor, " pos"] | Sequence[int], strings: dict[str, str]) -> str:
    """Tokens as one text in which nothing is invisible."""
    return "".join(_visible(ids, strings))


def parted_tokens(ids: Int[Tensor, " pos"] | Sequence[int], strings: dict[str, str]) -> str:
    """Tokens that a search put together, with a blank between them, which is no part of any: theirs are
    made visible."""
    return " ".join(_visible(ids, strings))


def drawn_places(
    result: CompleteSearch, layers: Sequence[int] | None, features: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """The layers and features that are shown: the chosen ones, or all layers and the first few features.

    Raises:
        ValueError: one was not searched, or none is chosen.
    """
    chosen = []
    for name, given, known in (
        ("layer", layers, result.layers),
        (feature_noun(result.site), features, result.features),
    ):
        # what is named twice is drawn once, or it would count as two that agree
        wanted = list(dict.fromkeys(known if given is None else given))
        for each in wanted:
            if each not in known:
                raise ValueError(f"{name} {each} was not searched: there are {_listed(known)}")
        if not wanted:
            raise ValueError(f"no {name} is chosen: there are {_listed(known)}")
        chosen.append(wanted)
    return chosen[0], chosen[1] if features is not None else chosen[1][:COLUMNS]


def plot_feature_tokens(
    result: CompleteSearch,
    *,
    layers: Sequence[int] | None = None,
    features: Sequence[int] | None = None,
    end: str = "highest",
) -> go.Figure:
    """Draw the token that excites each feature most as a table of layers, which go upwards, and features.

    Colours say in how many of the drawn layers the feature has this same token: a dark column is aligned.
    Layers go upwards as in all heatmaps of this package, unlike in the source, so that figures of one model
    can be read beside one another. Under the cursor stand the best tokens with their activations. A dash
    stands where no token excites the feature (`CompleteSearch.excites`).

    Args:
        layers: which; None draws all.
        features: which; None draws the first 8.
        end: `highest`, or `lowest` for the tokens that excite the features least.

    Raises:
        ValueError: a layer or feature that was not searched, none at all, or another end.

    Source: Badger, "Language Model Features", tables of "Complete Search Features".
    """
    check_type("result", result, CompleteSearch)
    if end not in ENDS:
        raise ValueError(f"end must be one of {', '.join(ENDS)}, but is {end!r}")
    layers, features = drawn_places(result, layers, features)
    rows = torch.tensor([result.layers.index(layer) for layer in layers])
    columns = torch.tensor([result.features.index(feature) for feature in features])
    highest = end == "highest"
    ids = (result.ids if highest else result.lowest_ids).cpu()[rows][:, columns]
    activations = (result.activations if highest else result.lowest_activations).cpu()[rows][:, columns]
    excites = result.excites.cpu()[rows][:, columns] if highest else torch.ones_like(ids, dtype=torch.bool)
    # a feature that no token excites shares none
    best, some = ids[..., 0], excites[..., 0]
    shared = ((best[None] == best[:, None]) & some[None]).sum(1).clamp(min=1)
    shared[~some] = 1
    noun = feature_noun(result.site)
    # letters are somewhat wider than half their height
    longest = max(4, min(_LABEL, int(((WIDTH - 170) / len(features) - 24) / 7.2) - 1))
    hovers, texts = [], []
    for i, layer in enumerate(layers):
        hovers.append(
            [
                f"<b>layer {layer}, {noun} {feature}</b><br>"
                + (
                    _best_tokens(
                        ids[i, j][excites[i, j]].tolist(), activations[i, j].tolist(), result.strings
                    )
                    + (f"<br>first in {int(shared[i, j])} of {len(layers)} layers" if len(layers) > 1 else "")
                    if some[i, j]
                    else "no token excites it"
                )
                for j, feature in enumerate(features)
            ]
        )
        texts.append(
            [
                visible_token(result.strings[str(token)], longest=longest) if excited else NO_TOKEN
                for token, excited in zip(best[i].tolist(), some[i].tolist(), strict=True)
            ]
        )
    # one layer agrees with nothing: all its cells are light
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
        f"Tokens that excite each {noun} of {place_words(result.site)} {ENDS[end]}",
        result.model.name,
        f"of all {result.model.d_vocab:,} tokens, each {prefix_words(result)}",
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
            **_NO_TICKS,
        },
        yaxis={
            "title": {"text": "layer"},
            "tickvals": list(range(len(layers))),
            "ticktext": [str(layer) for layer in layers],
            **_NO_TICKS,
        },
    )
    return figure


def searched_words(result: GradientSearch) -> str:
    """What a gradient search was for, for a title: `feature 7 at every position`, `the continuation ·a`."""
    if result.objective == "continuation":
        return f"the continuation {_target(result)}"
    noun, n_tokens = feature_noun(result.site), result.embeddings.shape[1]
    positions, features = (sorted(set(column)) for column in result.selected.T.tolist())
    if len(features) == 1:
        words = f"{noun} {features[0]}"
    else:
        named = f" {_listed(features)}" if len(features) <= _LONGEST_LIST else ""
        words = f"{len(features)} {noun}s" if not named else f"{noun}s{named}"
    if n_tokens == 1:
        return words
    if len(result.selected) != len(positions) * len(features):
        return f"{words} at chosen positions"
    if len(positions) == n_tokens:
        return f"{words} at every position"
    return f"{words} at position{'s' if len(positions) > 1 else ''} {_listed(positions)}"


def drawn_values(result: GradientSearch) -> tuple[str, Tensor, dict[str, Tensor]]:
    """What a search is judged by, as a reader would: its name, its values along the steps, and true ones.

    Activations where they were to become large (of several the mean, or the smallest), the log-probability
    of a continuation, else the distance.
    """
    if result.objective == "continuation":
        true = {way: -values for way, values in result.true_objectives.items()}
        return "log-probability (nats)", -result.objectives, true
    if result.objective in _DISTANCES:
        return _DISTANCES[result.objective], result.objectives, result.true_objectives
    if result.objective == "maximin":
        true = {way: -values for way, values in result.true_objectives.items()}
        return "smallest activation", -result.objectives, true
    several = " (mean)" if len(result.selected) > 1 else ""
    return f"activation{several}", result.activations, result.true_activations


def plot_gradient_search(result: GradientSearch) -> go.Figure:
    """Draw how activations rise along the steps of a gradient search, and what the tokens it found reach.

    A faint line is one restart, the strong one that of the best tokens. Right of the last step stand the true
    activations of the best tokens of each restart, as they were decoded; the dashed line is the optimum of a
    complete search, where it is known. Embeddings that no token has may reach more than every token. A search
    for a continuation is drawn as its log-probability, one for a target as the distance from it.

    Returns:
        A figure with the traces `restarts`, `restart of the best tokens`, one for each decoding, and
        `optimum`.
    """
    check_type("result", result, GradientSearch)
    what, values, true = drawn_values(result)
    values = values.double().cpu()
    n_restarts, n_steps = values.shape
    table = result.to_dataframe()
    way, restart = str(table["decoding"][0]), int(table["restart"][0])
    steps = list(range(n_steps))
    figure = go.Figure()
    others = [each for each in range(n_restarts) if each != restart]
    if others:
        lines = {each: values[each].tolist() for each in others}
        # a gap after each line makes them one trace
        figure.add_trace(
            go.Scatter(
                name="restarts",
                x=[x for _ in others for x in [*steps, None]],
                y=[y for each in others for y in [*lines[each], None]],
                customdata=[each for each in others for _ in range(n_steps + 1)],
                mode="lines",
                line={"color": ABSENT, "width": 1},
                hovertemplate="restart %{customdata}, step %{x}<br>%{y:.3f}<extra></extra>",
            )
        )
    figure.add_trace(
        go.Scatter(
            name="restart of the best tokens",
            x=steps,
            y=values[restart].tolist(),
            mode="lines",
            line={"color": BLUE, "width": 3},
            hovertemplate=f"restart {restart}, of the best tokens, step %{{x}}<br>%{{y:.3f}}<extra></extra>",
        )
    )
    apart = max(1.0, 0.05 * n_steps)
    for at, (name, reached) in enumerate(true.items(), start=1):
        symbol, colour = _MARKS.get(name, ("circle", MUTED))
        best = [name == way and each == restart for each in range(n_restarts)]
        figure.add_trace(
            go.Scatter(
                name=f"tokens by {figure_text(name)}",
                x=[steps[-1] + at * apart] * n_restarts,
                y=reached.double().tolist(),
                mode="markers",
                marker={
                    "symbol": symbol,
                    "color": colour,
                    "size": [13 if each else 7 for each in best],
                    "opacity": [1.0 if each else 0.5 for each in best],
                },
                hovertext=_found(result, name, reached),
                hoverinfo="text",
            )
        )
    end = steps[-1] + (len(true) + 1) * apart
    # the last step is named, and none so near that their numbers would touch
    every = max(1, round(n_steps / 8))
    is_activation = what.startswith("activation")
    if result.optimum is not None and is_activation:
        figure.add_trace(
            go.Scatter(
                name="optimum",
                x=[0, end],
                y=[result.optimum] * 2,
                mode="lines",
                line={"color": MUTED, "width": 1.5, "dash": "dash"},
                hovertemplate=f"largest activation of all tokens: {number(result.optimum)}<extra></extra>",
            )
        )
    best_value = float(true[way][restart])
    found = visible_cut(parted_tokens(result.best_ids(), result.strings))
    known = f"; optimum {number(result.optimum)}" if result.optimum is not None and is_activation else ""
    figure.update_layout(
        template=TEMPLATE,
        title_text=titles(
            f"Gradient search for {searched_words(result)}",
            f"{result.model.name}"
            + ("" if result.objective == "continuation" else f", {place_words(result.site, result.layer)}")
            + (", this block alone" if result.isolated else "")
            + f", {prefix_words(result)}",
            f"objective {result.objective}{_towards(result)}, prior {result.prior}, {result.optimiser}, "
            f"{n_restarts} restarts",
            f"best tokens: {found}, {number(best_value)}{known}",
        ),
        width=760,
        height=500,
        margin={"t": 136, "b": 100},
        xaxis={
            "title": {"text": "step"},
            "range": [-0.02 * end, end],
            # what stands right of the last step is no step
            "tickvals": sorted({*range(0, n_steps - every // 2, every), n_steps - 1}),
            "showgrid": False,
        },
        yaxis={"title": {"text": what}, "gridcolor": GRID},
        legend={"y": -0.16},
    )
    return figure


def plot_feature_examples(result: FeatureExamples, layer: int, feature: int) -> View:
    """Show the windows of a corpus that excite a feature most, each token shaded by its activation.

    Blue is above 0, red below, on one scale: the darkest tokens are those whose activation is furthest from 0
    in all windows. BOS, which has none that counts, is white. Jupyter shows it without a network,
    `.write_html("examples.html")` saves it as a page.

    Raises:
        ValueError: the layer or feature was not searched, or no window was read.
    """
    check_type("result", result, FeatureExamples)
    i, j = result.at(layer, feature)
    rows = result.windows[i, j].tolist()
    kept = [rank for rank, row in enumerate(rows) if row >= 0]
    if not kept:
        raise ValueError("there is nothing to show: no window was read")
    tokens = [[result.strings[str(token)] for token in result.tokens[rows[rank]].tolist()] for rank in kept]
    # JSON cannot say nan, and more digits than can be told apart are noise under the cursor
    activations = [
        [float(f"{value:.4g}") for value in result.activations[i, j, rank].double().nan_to_num(0).tolist()]
        for rank in kept
    ]
    # The component shades blue up to the largest and red down to the smallest of all numbers, however near 0
    # that is. Two more in each window, behind its last token and so not drawn, make them one scale.
    largest = max(abs(value) for window in activations for value in window) or 1.0
    activations = [[*window, largest, -largest] for window in activations]
    return View(
        "TopkSamples",
        {
            "tokens": [[[[_no_markup(visible_token(token)) for token in window] for window in tokens]]],
            "activations": [[activations]],
            "zerothDimensionName": "Layer",
            "zerothDimensionLabels": [str(layer)],
            "firstDimensionName": feature_noun(result.site).capitalize(),
            "firstDimensionLabels": [str(feature)],
        },
    )


def visible_cut(text: str, longest: int = 60) -> str:
    """A text that was made visible already, shortened."""
    return text if len(text) <= longest else text[:longest] + "…"


# -- parts -----------------------------------------------------------------------------------------


def _visible(ids: Int[Tensor, " pos"] | Sequence[int], strings: dict[str, str]) -> list[str]:
    every = ids.tolist() if isinstance(ids, Tensor) else ids
    return [visible_token(strings[str(token)]) for token in every]


def _listed(values: Iterable[int]) -> str:
    every = list(values)
    return ", ".join(map(str, every[:20])) + (", ..." if len(every) > 20 else "")


def _label(token: str) -> str:
    return figure_text(visible_token(token, longest=_LABEL))


def _towards(result: GradientSearch) -> str:
    return f" towards {visible_cut(_target(result))}" if result.objective in _DISTANCES else ""


def _target(result: GradientSearch) -> str:
    """The target as tokens; by its ids where the result does not know their texts."""
    assert result.target_ids is not None
    ids = result.target_ids.tolist()
    known = all(str(token) in result.strings for token in ids)
    return shown_tokens(ids, result.strings) if known else f"of the ids {_listed(ids)}"


def _best_tokens(ids: list[int], activations: list[float], strings: dict[str, str]) -> str:
    """The first tokens with their activations, one in a line."""
    lines = [
        f"{rank}. {figure_text(visible_token(strings[str(token)]))} {number(value)}"
        for rank, (token, value) in enumerate(zip(ids, activations, strict=False), start=1)
    ]
    return "<br>".join(lines[:_HOVERED])


def _found(result: GradientSearch, way: str, reached: Tensor) -> list[str]:
    """What each restart's tokens of one decoding are and reach."""
    cosines = result.nearest_cosine.double().mean(-1).tolist()
    return [
        f"<b>{figure_text(visible_cut(parted_tokens(ids, result.strings)))}</b><br>restart {restart}, {way}"
        f"<br>{number(float(reached[restart]))}"
        f"<br>its embedding's cosine to the nearest real one {number(cosines[restart])}"
        for restart, ids in enumerate(result.ids[way].tolist())
    ]


def _no_markup(token: str) -> str:
    """A token that stays a text in circuitsvis, which puts tokens into the page as markup.

    Entities would be right in the text, but are shown as they are under the cursor.
    """
    return token.replace("<", f"<{_APART}").replace("&", f"&{_APART}")
