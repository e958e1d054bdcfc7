"""Sections on features: exhaustive and greedy searches, and examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from mechlens.results import ExhaustiveSearch, FeatureExamples, GradientSearch, GreedySearch
from mechlens.results.features import NO_TOKEN, place_words
from mechlens.show.section import Figure, Section, Table, drawn, joined
from mechlens.text.display import count

Search = TypeVar("Search", GreedySearch, GradientSearch)
DRAWN = 8
"""Features that a section shows by default."""
SHOWN = 16
"""Pairs of a layer and a feature whose examples are shown by default."""
NAMED = 8
"""Cells of a figure that its description names."""
_FEATURES = {
    "feature": "A basis dimension of an activation: one number at every position of a text.",
    "neuron": "A basis dimension of an MLP's hidden layer, after its nonlinearity.",
    "direction": "A vector; its dot product with the residual stream is the activation.",
}
_EXHAUSTIVE = {
    "Exhaustive search": "Every token of the vocabulary is run, so the best is the optimum for one token."
}
_GREEDY = {
    "Greedy search": (
        "The input is built from left to right. Each token is the one that activates the feature most after "
        "those before it. Other inputs may activate the feature more."
    )
}
_WINDOW = {"Window": "A piece of the corpus. All have the same length and are counted from 0."}


def feature_terms(*nouns: str) -> dict[str, str]:
    """Definitions of features, neurons and directions for a section."""
    return {noun.capitalize(): _FEATURES[noun] for noun in sorted(nouns)}


def exhaustive_search_section(
    result: ExhaustiveSearch,
    *,
    layers: Sequence[int] | None = None,
    features: Sequence[int] | None = None,
    title: str = "Maximally activating tokens",
    text: str = "",
) -> Section:
    """The best tokens by layer and feature as a figure, the best and the worst as a table.

    Args:
        layers: those to show; None is all.
        features: those to show; None is the first 8.

    Raises:
        ValueError: a layer or feature that was not searched.
    """
    noun, place = result.noun, place_words(result.site)
    features = result.features[:DRAWN] if features is None else features
    layers = result.layers if layers is None else layers
    rows = result.summary(len(result.ids.flatten()), layers=layers, features=features)
    best = rows[rows["rank"] == 1]
    named = [
        f"{noun} {row.feature} of layer {row.layer}: {row.highest}" for row in best.head(NAMED).itertuples()
    ]
    missing = int((best["highest"] == NO_TOKEN).sum())
    said = [
        f"The activation of {count(len(result.features), noun)} of {place} in "
        f"{count(len(result.layers), 'layer')} was computed for each of the {result.model.d_vocab:,} tokens, "
        f"{result.begins}.",
        f"{NO_TOKEN}: no (further) token activates the {noun} ({missing} of {len(best)} have none)."
        if NO_TOKEN in set(rows["highest"])
        else "",
        f"Shown: {len(features)} of {count(len(result.features), noun)}."
        if len(features) < len(result.features)
        else "",
    ]
    columns = [
        result.column(each.name) for each in result.columns if each.name != "rank" or len(best) < len(rows)
    ]
    darker = (
        f", darker where the {noun} has the same token in more of these layers" if len(layers) > 1 else ""
    )
    return Section(
        title,
        joined(text, " ".join(filter(None, said))),
        [
            Figure(
                drawn("plot_feature_tokens", result, layers=layers, features=features),
                f"The maximally activating token of each {noun}{darker}. Layer 0 is at the bottom. Hover for "
                "the next best tokens and their activations.",
                f"Best tokens by layer and {noun}. {'; '.join(named)}.",
                keeps_width=True,
            ),
            Table.of(
                rows,
                columns,
                f"Tokens with the highest and the lowest activation of each {noun}",
                folded=True,
            ),
        ],
        feature_terms(noun) | _EXHAUSTIVE,
    )


def greedy_search_section(
    results: Sequence[GreedySearch], *, title: str = "Greedy search", text: str = ""
) -> Section:
    """The inputs of each search, and the activations at their tokens.

    Args:
        results: searches that differ in layer or otherwise.

    Raises:
        ValueError: no results.
    """
    first = some(results, "search_greedy")
    varying = differing(
        results,
        {
            "model": lambda each: each.model.name,
            "site": lambda each: each.site,
            "begins": lambda each: each.begins,
            "tokens": lambda each: each.ids.shape[-1],
            "ranked by": lambda each: each.ranked_by,
        },
    )
    beam = max(result.ids.shape[1] for result in results)
    names = [each.name for each in first.columns if each.name != "rank" or beam > 1]
    rows = [
        [*(values[at] for values in varying.values()), *row]
        for at, result in enumerate(results)
        for row in result.summary(len(result.features) * beam)[names].to_numpy().tolist()
    ]
    lengths = " or ".join(dict.fromkeys(str(each.ids.shape[-1]) for each in results))
    said = (
        f"Inputs of {lengths} tokens, separated by spaces, "
        f"{' or '.join(dict.fromkeys(each.begins for each in results))}. Each token is the one of "
        f"{first.model.d_vocab:,} that activates the {first.noun} of {place_words(first.site)} most after "
        "those before it. Inputs are ranked by the "
        f"{' or '.join(dict.fromkeys(e.ranked_by for e in results))}"
        + (f"; {beam} are kept at each step" if beam > 1 else "")
        + "."
    )
    return Section(
        title,
        joined(text, said),
        [
            Table(
                [*varying, *map(first.column, names)],
                rows,
                f"The best input{'s' if beam > 1 else ''} of each {first.noun}",
            )
        ],
        feature_terms(first.noun) | _GREEDY,
    )


def feature_examples_section(
    result: FeatureExamples,
    *,
    places: Sequence[tuple[int, int]] | None = None,
    title: str = "Maximally activating examples",
    text: str = "",
) -> Section:
    """The windows of a corpus with the largest activations, shaded, and a table of the largest ones.

    Args:
        places: (layer, feature) pairs to show; None is the first 16.

    Raises:
        ValueError: no pairs, or one that was not searched.
    """
    every = [
        (layer, feature)
        for layer in result.layers
        for feature in result.features
        if (result.windows[result.at(layer, feature)] >= 0).any()
    ]
    places = every[:SHOWN] if places is None else places
    if not len(places):
        raise ValueError("nothing to show: give at least one (layer, feature)")
    noun = result.noun
    for place in places:
        result.at(*place)
    table = result.summary(result.windows.numel())
    shown = table[[place in set(places) for place in zip(table["layer"], table["feature"], strict=True)]]
    figures = [
        Figure(
            drawn("plot_feature_examples", result, layer, feature),
            f"{noun.capitalize()} {feature} of {place_words(result.site, layer)}: windows, largest "
            "activation first. Each token is shaded by its activation, blue above 0 and red below, on one "
            "scale. Hover for numbers.",
        )
        for layer, feature in places
    ]
    bos = ", each with BOS first" if result.prepend_bos else ""
    said = (
        f"The windows with the largest activations among {count(result.read, 'window')} of "
        f"{result.tokens.shape[1]} tokens{bos}."
        + (f" Shown: {len(places)} of {count(len(every), noun)}." if len(places) < len(every) else "")
    )
    return Section(
        title,
        joined(text, said),
        [
            *figures,
            Table.of(
                shown,
                [result.column(each.name) for each in result.columns],
                "Where the activation is largest, with the «token»",
                folded=True,
            ),
        ],
        feature_terms(noun) | _WINDOW,
    )


def some(results: Sequence[Search], maker: str) -> Search:
    """The first result.

    Raises:
        ValueError: there are none.
    """
    if not results:
        raise ValueError(f"nothing to show: give at least one result of {maker}")
    return results[0]


def differing(
    results: Sequence[Search], about: Mapping[str, Callable[[Search], str | int]]
) -> dict[str, list[str | int]]:
    """The properties in which the results differ, each with its values."""
    every = {name: [read(each) for each in results] for name, read in about.items()}
    return {name: values for name, values in every.items() if len(set(values)) > 1}


SECTIONS = {
    ExhaustiveSearch: exhaustive_search_section,
    GreedySearch: lambda result, **options: greedy_search_section([result], **options),
    FeatureExamples: feature_examples_section,
}
