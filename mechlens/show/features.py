"""A report's sections on features: results in, `Section`s out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from mechlens.plots.features import (
    EXCITING,
    NO_TOKEN,
    drawn_places,
    feature_noun,
    parted_tokens,
    place_words,
    plot_feature_examples,
    plot_feature_tokens,
    plot_gradient_search,
    prefix_words,
    searched_words,
    shown_tokens,
    visible_cut,
)
from mechlens.results import (
    CompleteSearch,
    FeatureExamples,
    GradientSearch,
    GreedySearch,
)
from mechlens.show.section import Figure, Section, Table
from mechlens.text.display import number

Search = TypeVar("Search", GreedySearch, GradientSearch)
NAMED = 8
"""Cells of a figure that its description names."""
CONTEXT = 12
"""Tokens on either side of the one that excites a feature most, in a table."""

_FEATURES = {
    "feature": (
        "One element of an activation, in the model's own basis: a number at every position of a text."
    ),
    "neuron": "One element of an MLP's hidden layer, after its nonlinearity.",
    "direction": "A vector whose product with the residual stream is the feature's activation.",
}
_COMPLETE = {
    "Complete search": "Every token of the vocabulary is run; the best is the feature's optimum of one token."
}
_GREEDY = {
    "Greedy search": (
        "The input is built from left to right: of all tokens the one that excites the feature most behind "
        "those before it. Tokens chosen otherwise may reach more together."
    ),
    "Ranked by": "What decides between inputs: the activation at the last token, or the sum over all.",
}
_AGGREGATES = {"last": "activation at the last token", "sum": "sum of the activations"}
_GRADIENT = {
    "Gradient search": (
        "Embeddings of tokens are changed by gradients until they excite the feature; what they are nearest "
        "to is read as tokens, and these are run."
    ),
    "True activation": (
        "What the tokens reach when they are run, of several selected elements the mean; embeddings of no "
        "token may reach more."
    ),
    "Nearest cosine": (
        "Cosine of the embedding found to the nearest real one, mean over positions; 1 is a real one."
    ),
    "True objective": (
        "What the search made small, of the tokens: the distance from the target, or minus the "
        "log-probability of the continuation in nats."
    ),
    "Prior": (
        "What keeps the embeddings close to real ones. Softmax: they are mixtures of real ones. Norm and "
        "nearest: a penalty for another norm than theirs, or for the distance to the nearest one."
    ),
}
_EXAMPLES = {"Window": "A piece of the corpus, as long as all the others; counted from 0."}


def feature_terms(*nouns: str) -> dict[str, str]:
    """What features, neurons and directions are, for a section's definitions."""
    return {noun.capitalize(): _FEATURES[noun] for noun in sorted(nouns)}


def complete_search_section(
    result: CompleteSearch,
    *,
    layers: Sequence[int] | None = None,
    features: Sequence[int] | None = None,
    title: str = "Tokens that excite features most",
    text: str = "",
) -> Section:
    """The best tokens by layer and feature as a picture, and the best and the worst as a table.

    Args:
        layers: which; None shows all.
        features: which; None shows the first 8.
        text: what to look for.

    Raises:
        ValueError: a layer or feature that was not searched.
    """
    noun = feature_noun(result.site)
    layers, features = drawn_places(result, layers, features)
    ends = ((result.ids, result.activations), (result.lowest_ids, result.lowest_activations))
    rows: list[tuple[str | float, ...]] = []
    for layer in layers:
        for feature in features:
            at = result.layers.index(layer), result.features.index(feature), 0
            row: list[str | float] = [layer, feature]
            for ids, activations in ends:
                excited = ids is not result.ids or bool(result.excites[at])
                token = shown_tokens([int(ids[at])], result.strings) if excited else NO_TOKEN
                row += [token, float(activations[at])]
            rows.append(tuple(row))
    named = "; ".join(f"{noun} {row[1]} of layer {row[0]}: {row[2]}" for row in rows[:NAMED])
    said = (
        f"The activation of every {noun} of {place_words(result.site)} was computed for each of the "
        f"{result.model.d_vocab:,} tokens, {prefix_words(result)}: {len(result.features):,} "
        f"{noun}{_s(len(result.features))} in {len(result.layers)} layer{_s(len(result.layers))}."
    )
    return Section(
        title,
        _joined(text, said),
        [
            Figure(
                plot_feature_tokens(result, layers=layers, features=features),
                f"The token that excites each {noun} most"
                + (
                    f", the first layer at the bottom; darker where the {noun} has the same token in more of "
                    "these layers"
                    if len(layers) > 1
                    else ""
                )
                + (f"; {NO_TOKEN} where no token does" if any(row[2] == NO_TOKEN for row in rows) else "")
                + ". Point at a cell for the next best tokens and their activations.",
                f"Best tokens by layer and {noun}. {named}.",
                keeps_width=True,
            ),
            Table(
                ("layer", noun, "highest", "activation", "lowest", "activation"),
                rows,
                "The tokens with the highest and the lowest activation as a table",
                folded=True,
            ),
        ],
        feature_terms(noun) | _COMPLETE,
    )


def greedy_search_section(
    results: Sequence[GreedySearch], *, title: str = "Greedy search", text: str = ""
) -> Section:
    """The best input of each feature, a row for each search, and the activations at their tokens.

    Args:
        results: one for each layer, as in the source's table, or such as differ otherwise.
        text: what to look for.

    Raises:
        ValueError: no result.
    """
    results = _some(results, "search_greedy")
    noun = feature_noun(results[0].site)
    about = _differing(
        results,
        {
            "model": lambda each: each.model.name,
            "site": lambda each: each.site,
            "begins": prefix_words,
            "tokens": lambda each: each.ids.shape[-1],
            "ranked by": lambda each: each.aggregate,
        },
    )
    features = list(dict.fromkeys(feature for each in results for feature in each.features))
    inputs: list[tuple[str | float | None, ...]] = []
    activations: list[tuple[str | float, ...]] = []
    for at, result in enumerate(results):
        begins: tuple[str | int, ...] = (result.layer, *(values[at] for values in about.values()))
        best = dict(zip(result.features, result.ids[:, 0].tolist(), strict=True))
        inputs.append(
            (
                *begins,
                *(
                    parted_tokens(best[feature], result.strings) if feature in best else None
                    for feature in features
                ),
            )
        )
        for j, feature in enumerate(result.features):
            each = ", ".join(
                f"{shown_tokens([token], result.strings)} {number(value, 2)}"
                for token, value in zip(best[feature], result.activations[j, 0].tolist(), strict=True)
            )
            score = float(result.scores[j, 0])
            activations.append((*begins, feature, parted_tokens(best[feature], result.strings), each, score))
    first = results[0]
    said = (
        f"Inputs of {_every(results, lambda each: each.ids.shape[-1])} tokens (a blank parts two), "
        f"{' or '.join(dict.fromkeys(map(prefix_words, results)))}, each token the one of "
        f"{first.model.d_vocab:,} that excites the {noun} of {place_words(first.site)} most behind those "
        f"before it; ranked by the {_every(results, lambda each: _AGGREGATES[each.aggregate])}"
        + (f", {first.ids.shape[1]} inputs kept in each step" if first.ids.shape[1] > 1 else "")
        + "."
    )
    heads = ("layer", *about)
    return Section(
        title,
        _joined(text, said),
        [
            Table(
                (*heads, *(f"{noun} {feature}" for feature in features)),
                inputs,
                f"The best input of each {noun}",
            ),
            Table(
                (*heads, noun, "input", "activation at each token", "score"),
                activations,
                "Their activations as a table",
                folded=True,
            ),
        ],
        feature_terms(noun) | _GREEDY,
    )


def gradient_search_section(
    results: Sequence[GradientSearch], *, title: str = "Gradient search", text: str = ""
) -> Section:
    """What each search found and how far it is from the optimum, and the way of the first as a picture.

    Args:
        text: what to look for.

    Raises:
        ValueError: no result.
    """
    results = _some(results, "search_gradient")
    about = _differing(
        results,
        {
            "model": lambda each: each.model.name,
            "begins": prefix_words,
            "objective": lambda each: each.objective,
            "prior": lambda each: each.prior,
            "optimiser": lambda each: each.optimiser,
            "block alone": lambda each: "yes" if each.isolated else "no",
        },
    )
    rows, has_optimum = [], any(result.optimum is not None for result in results)
    has_activation = any(result.objective != "continuation" for result in results)
    # else it says the same as the activation
    has_goal = any(result.objective not in EXCITING for result in results)
    has_several = any(len(result.selected) > 1 and result.objective in EXCITING for result in results)
    for at, result in enumerate(results):
        best = result.to_dataframe().iloc[0]
        activation = float(best["activation"])
        rows.append(
            (
                # a continuation is of no layer
                None if result.objective == "continuation" else result.layer,
                searched_words(result),
                *(values[at] for values in about.values()),
                parted_tokens(best["ids"], result.strings),
                best["decoding"],
                *([None if activation != activation else activation] if has_activation else []),
                *([float(best["smallest_activation"])] if has_several else []),
                *([result.optimum] if has_optimum else []),
                *([float(best["objective"])] if has_goal else []),
                float(best["nearest_cosine"]),
            )
        )
    first = results[0]
    found = rows[0][2 + len(about)]
    said = (
        f"{first.embeddings.shape[0]} restart{_s(first.embeddings.shape[0])} of {first.embeddings.shape[1]} "
        f"token{_s(first.embeddings.shape[1])}, at most {first.objectives.shape[1] - 1} steps "
        f"of {first.optimiser}. For comparison: the cosine of a real embedding to the nearest other one is "
        f"{number(first.token_cosine)} on average."
    )
    return Section(
        title,
        _joined(text, said),
        [
            Table(
                (
                    "layer",
                    "searched",
                    *about,
                    "best tokens",
                    "decoded by",
                    *(["true activation"] if has_activation else []),
                    *(["smallest of them"] if has_several else []),
                    *(["optimum"] if has_optimum else []),
                    *(["true objective"] if has_goal else []),
                    "nearest cosine",
                ),
                rows,
                "The best tokens of each search" if len(rows) > 1 else "The best tokens",
            ),
            Figure(
                plot_gradient_search(first),
                "Each line is a restart, the strong one that of the best tokens; marks to the right are what "
                "the tokens reach that were found, run as tokens."
                + (" Dashed: the largest activation of all tokens." if first.optimum is not None else ""),
                f"Values along the steps of the gradient search for {searched_words(first)}. Best tokens: "
                f"{visible_cut(str(found))}.",
            ),
        ],
        feature_terms(feature_noun(first.site)) | _GRADIENT,
    )


def feature_examples_section(
    result: FeatureExamples,
    places: Sequence[tuple[int, int]],
    *,
    title: str = "Texts that excite features most",
    text: str = "",
) -> Section:
    """The windows of a corpus that excite each of some features most, shaded, and their peaks as a table.

    Args:
        places: layer and feature of each.
        text: what to look for.

    Raises:
        ValueError: no place, or one that was not searched.
    """
    if not len(places):
        raise ValueError("there is nothing to show: give at least one (layer, feature)")
    noun = feature_noun(result.site)
    parts: list[Figure | Table] = []
    rows: list[tuple[str | float, ...]] = []
    for layer, feature in places:
        parts.append(
            Figure(
                plot_feature_examples(result, layer, feature),
                f"{noun.capitalize()} {feature} of {place_words(result.site, layer)}: windows with the "
                "largest activation first, each token shaded by its own (blue above 0, red below, on one "
                "scale). Point at a token for its number.",
            )
        )
        i, j = result.at(layer, feature)
        peaks = result.peaks[i, j].tolist()
        found = zip(result.windows[i, j].tolist(), result.positions[i, j].tolist(), strict=True)
        for rank, (window, pos) in enumerate(found):
            if window < 0:
                continue
            ids = result.tokens[window].tolist()
            begin, end = max(0, pos - CONTEXT), pos + CONTEXT + 1
            context = (
                ("…" if begin else "")
                + shown_tokens(ids[begin:pos], result.strings)
                + f"[{shown_tokens(ids[pos : pos + 1], result.strings)}]"
                + shown_tokens(ids[pos + 1 : end], result.strings)
                + ("…" if end < len(ids) else "")
            )
            rows.append((layer, feature, rank + 1, int(result.numbers[window]), pos, peaks[rank], context))
    parts.append(
        Table(
            ("layer", noun, "rank", "window", "position", "activation", "around the [largest]"),
            rows,
            "Where the activation is largest as a table",
            folded=True,
        )
    )
    said = (
        f"Of {result.read:,} windows of {result.tokens.shape[1]} tokens"
        f"{', which begin with BOS,' if result.prepend_bos else ''} those in which the {noun} is largest."
    )
    return Section(title, _joined(text, said), parts, feature_terms(noun) | _EXAMPLES)


# -- parts -----------------------------------------------------------------------------------------


def _joined(text: str, said: str) -> str:
    return f"{text}\n\n{said}" if text else said


def _s(count: int) -> str:
    """The plural's."""
    return "" if count == 1 else "s"


def _some(results: Sequence[Search], maker: str) -> list[Search]:
    if not results:
        raise ValueError(f"there is nothing to show: give at least one result of {maker}")
    return list(results)


def _differing(
    results: Sequence[Search], about: dict[str, Callable[[Search], str | int]]
) -> dict[str, list[str | int]]:
    """Of what could be said about each result only that in which they differ."""
    every = {name: [read(each) for each in results] for name, read in about.items()}
    return {name: values for name, values in every.items() if len(set(values)) > 1}


def _every(results: Sequence[Search], read: Callable[[Search], str | int]) -> str:
    return " or ".join(dict.fromkeys(str(read(each)) for each in results))
