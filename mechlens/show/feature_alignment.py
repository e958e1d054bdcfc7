"""The section on feature alignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mechlens.results import FeatureAlignment, Share
from mechlens.results.feature_alignment import contrast_words, index_shares, left_out_words, result_names
from mechlens.results.features import feature_noun, place_words
from mechlens.show.features import feature_terms
from mechlens.show.section import Figure, Section, Table, drawn, joined
from mechlens.text.display import count

_TERMS = {
    "Aligned features": (
        "Features with the same number have the same best token in two layers more often than by chance."
    ),
    "Chance": "How often two features with different numbers have the same best tokens in these layers.",
    "Interval": "95% confidence interval of the share (Clopper and Pearson), with features as the sample.",
    "Token of the same number": (
        "The best token's id is the feature's number, as an artifact of decoding would make it. Chance is "
        "one over the size of the vocabulary."
    ),
}
_COLUMNS = ("share (95% interval)", "chance", "verdict")


def feature_alignment_section(
    results: Sequence[FeatureAlignment],
    *,
    names: Sequence[str] | None = None,
    title: str = "Feature alignment",
    text: str = "",
) -> Section:
    """How often features have the same best tokens in two layers, compared with chance, with heatmaps.

    Args:
        results: for example, of a trained model and of random weights.
        names: what they are called; None takes the models' names.

    Raises:
        ValueError: no results, or a different number of names.
    """
    results = list(results)
    called = result_names(results, names)
    pairs = list(zip(called, results, strict=True))
    several = [(name, each) for name, each in pairs if each.top_k > 1]
    tops = " or ".join(map(str, sorted({each.top_k for _, each in several})))
    means = "; ".join(f"{name} {each.share().text}" for name, each in pairs)
    gray = "; a layer with itself is gray" if any(each.within for each in results) else ""
    parts: list[Figure | Table] = [
        Table(
            ("compared", *_COLUMNS),
            [(name, *_cells(each.share())) for name, each in pairs],
            "Features with the same best token, mean over pairs of layers",
        ),
        Figure(
            drawn("plot_feature_alignment", *results, names=called),
            "Share of features with the same best token in two layers, from 0 (light) to 1 (dark). Layer 0 "
            f"is at the bottom left{gray}. Hover for intervals and chance.",
            f"Heatmaps of the share of features with the same best token, by two layers. Mean: {means}.",
            keeps_width=len(results) > 1,
        ),
    ]
    if several:
        kept = [name for name, _ in several]
        parts += [
            Table(
                ("compared", *_COLUMNS),
                [(name, *_cells(each.share("overlap"))) for name, each in several],
                f"Overlap of the {tops} best tokens, mean over pairs of layers",
            ),
            Figure(
                drawn("plot_feature_alignment", *(each for _, each in several), names=kept, what="overlap"),
                f"Share of the {tops} best tokens that are the same, in any order.",
                f"Heatmaps of the share of the {tops} best tokens that are the same, by two layers.",
                keeps_width=len(several) > 1,
            ),
        ]
    own = index_shares(results)
    if own:
        parts.append(
            Table(
                ("features of", *_COLUMNS),
                [(name, *_cells(share)[:2], share.index_verdict) for name, share in own.items()],
                "Features whose best token's id is their number, mean over layers",
            )
        )
    parts.append(
        Table(
            ("compared", "layer", "with layer", *_COLUMNS),
            [
                (name, *pair, *_cells(each.share("same", [pair])))
                for name, each in pairs
                for pair in each.pairs()
            ],
            "Features with the same best token, by pair of layers",
            folded=True,
            where="page",
        )
    )
    said = (_compared(pairs), _one_layer(results), left_out_words(results), contrast_words(results, called))
    return Section(
        title,
        joined(text, " ".join(filter(None, said))),
        parts,
        feature_terms(*{feature_noun(each.site) for each in results}) | _TERMS,
    )


def _cells(share: Share) -> tuple[str | None, str | None, str | None]:
    """A share with its interval, chance, and the verdict."""
    return share.text, share.chance_text or None, share.verdict or None


def _compared(pairs: Sequence[tuple[str, FeatureAlignment]]) -> str:
    """What is compared, for each name where it differs."""
    groups: dict[str, list[str]] = {}
    for name, result in pairs:
        other = f" with those of {place_words(result.other_site)}" if result.other_site != result.site else ""
        features = (
            f"{count(len(result.features), feature_noun(result.site))} of {place_words(result.site)}{other}"
        )
        groups.setdefault(f"{features}, {_pairs(result)}", []).append(name)
    if len(groups) == 1:
        return f"Compared: {next(iter(groups))}."
    sentences = [f"{words}: {'; '.join(names)}." for words, names in groups.items()]
    return " ".join(sentences)


def _pairs(result: FeatureAlignment) -> str:
    if result.within:
        return "each layer with each later one"
    same = any(one == other for one, other in result.pairs())
    return f"each layer with {'the same layer' if same else 'each layer'} of the other"


def _one_layer(results: Sequence[FeatureAlignment]) -> str:
    """Why layers are not compared with each other if there is only one."""
    if any(each.within for each in results) or len(results[0].layers) > 1:
        return ""
    return "Layers are not compared with each other, because only one was searched."


def _section(result: FeatureAlignment, **options: Any) -> Section:
    return feature_alignment_section([result], **options)


SECTIONS = {FeatureAlignment: _section}
