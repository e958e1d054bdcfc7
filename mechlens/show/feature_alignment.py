"""A report's section on feature alignment: results in, a `Section` out."""

from __future__ import annotations

from collections.abc import Sequence

from mechlens.plots.feature_alignment import (
    chance_words,
    index_shares,
    index_verdict,
    left_out_words,
    plot_feature_alignment,
    result_names,
    share_lines,
)
from mechlens.plots.features import feature_noun, place_words
from mechlens.results import FeatureAlignment, Share
from mechlens.show.features import feature_terms
from mechlens.show.section import Figure, Section, Table
from mechlens.text.display import number

_TERMS = {
    "Aligned features": (
        "The same feature, counted by its number, has the same best token in two layers, more often than "
        "chance has it."
    ),
    "Chance": "How often two features of unlike numbers have the same best tokens in these layers.",
    "Interval": "Where the share lies with 95% confidence, features being a sample (Clopper and Pearson's).",
    "Token of the same number": (
        "The best token's id is the feature's number, as an artefact of decoding would have it; chance is "
        "one in the vocabulary."
    ),
}


def feature_alignment_section(
    results: Sequence[FeatureAlignment],
    *,
    names: Sequence[str] | None = None,
    title: str = "Feature alignment",
    text: str = "",
) -> Section:
    """How often features have the same best tokens in two layers: the shares beside chance, and heatmaps.

    Args:
        results: such as of a trained model and an untrained one.
        names: what they are called; None takes the models' names.
        text: what to look for.

    Raises:
        ValueError: no result, or not as many names.
    """
    results = list(results)
    called = result_names(results, names)
    tops = " or ".join(str(top) for top in sorted({each.top_k for each in results if each.top_k > 1}))
    shown = {"same": "the same best token", **({"overlap": f"of the {tops} best tokens"} if tops else {})}
    rows = []
    for result, name in zip(results, called, strict=True):
        row: list[str] = [name]
        for what in shown:
            share = result.share(what)
            known = what == "same" or result.top_k > 1
            row += [*_share_cells(share), share.verdict or "—"] if known else ["—"] * 3
        rows.append(row)
    summaries = "; ".join(
        f"{name} {', '.join(share_lines(result.share()))}"
        for result, name in zip(results, called, strict=True)
    )
    any_within = any(result.within for result in results)
    overlaps = [result for result in results if result.top_k > 1]
    parts: list[Figure | Table] = [
        Table(
            ("compared", *(head for words in shown.values() for head in (words, "chance", "verdict"))),
            rows,
            "Share of features (95% interval), mean over pairs of layers",
        ),
        Figure(
            plot_feature_alignment(*results, names=called),
            "Share of features with the same best token in two layers, from 0 (light) to 1 (dark); layer 0 "
            "is at the bottom left"
            + ("; a layer with itself, which says nothing, is grey" if any_within else "")
            + ". Point at a cell for its interval and chance.",
            f"Heatmaps of the share of features with the same best token, by two layers. Mean: {summaries}.",
            keeps_width=len(results) > 1,
        ),
    ]
    if overlaps:
        kept = [name for result, name in zip(results, called, strict=True) if result.top_k > 1]
        parts.append(
            Figure(
                plot_feature_alignment(*overlaps, names=kept, what="overlap"),
                f"The same of the {tops} best tokens, in any order.",
                f"Heatmaps of the share of the {tops} best tokens that are the same, by two layers.",
                keeps_width=len(overlaps) > 1,
            )
        )
    own = index_shares(results)
    if own:
        parts.append(
            Table(
                ("features of", "token of the same number", "chance", "verdict"),
                [(name, *_share_cells(share), index_verdict(share)) for name, share in own.items()],
                "Share of features whose best token's id is their number (95% interval), mean over layers",
            )
        )
    pairs = [
        (name, one, other, result.share("same", [(one, other)]))
        for result, name in zip(results, called, strict=True)
        for one, other in result.pairs()
    ]
    parts.append(
        Table(
            ("compared", "layer", "with layer", "the same best token", "chance", "verdict"),
            [
                (name, one, other, *_share_cells(share), share.verdict or "—")
                for name, one, other, share in pairs
            ],
            "The pairs of layers as a table",
            folded=True,
        )
    )
    compared = " ".join(filter(None, (_compared_words(results, called), left_out_words(results))))
    return Section(
        title,
        f"{text}\n\n{compared}" if text else compared,
        parts,
        feature_terms(*{feature_noun(each.site) for each in results}) | _TERMS,
    )


def _share_cells(share: Share) -> tuple[str, str]:
    """A share with its interval, and chance."""
    if share.value != share.value:
        return "—", "—"
    chance = "—" if share.chance != share.chance else chance_words(share)
    return f"{number(share.value)} ({number(share.low)} to {number(share.high)})", chance


def _compared_words(results: Sequence[FeatureAlignment], called: Sequence[str]) -> str:
    """What is compared: said once where it is the same of all, else with the names of those it is said of."""
    features = [_features_words(result) for result in results]
    same = len(set(features)) == 1
    groups: dict[str, list[str]] = {}
    for result, words, name in zip(results, features, called, strict=True):
        pairs = _pairs_words(result)
        groups.setdefault(pairs if same else f"{words}, {pairs}", []).append(name)
    if same and len(groups) == 1:
        return f"Compared are {features[0]}, {next(iter(groups))}."
    sentences = [f"{words[0].upper()}{words[1:]}: {'; '.join(names)}." for words, names in groups.items()]
    return " ".join([f"Compared are {features[0]}."] * same + sentences)


def _features_words(result: FeatureAlignment) -> str:
    count = len(result.features)
    return (
        f"{count:,} {feature_noun(result.site)}{'' if count == 1 else 's'} of {place_words(result.site)}"
        + (f" with those of {place_words(result.other_site)}" if result.other_site != result.site else "")
    )


def _pairs_words(result: FeatureAlignment) -> str:
    if result.within:
        return "each layer with each later one"
    if any(one == other for one, other in result.pairs()):
        return "each layer with the same layer of the other"
    return "each layer with each layer of the other"
