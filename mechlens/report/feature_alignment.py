"""A report's section on feature alignment: results in, a `Section` out."""

from __future__ import annotations

from collections.abc import Sequence

from mechlens.plots.feature_alignment import (
    chance_words,
    plot_feature_alignment,
    result_names,
    share_lines,
)
from mechlens.plots.features import feature_noun, place_words
from mechlens.plots.style import number
from mechlens.report.features import feature_terms
from mechlens.report.page import Plot, Section, Table
from mechlens.results import FeatureAlignment, Share
from mechlens.results.feature_alignment import CHANCE

_TERMS = {
    "Aligned features": (
        "The same feature, counted by its number, has the same best token in two layers, more often than "
        "chance has it."
    ),
    "Chance": "How often two features of unlike numbers have the same best tokens in these layers.",
    "Interval": "Where the share lies with 95% confidence, features being a sample (Wilson's).",
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
    rows: list[tuple[str | float, ...]] = []
    for result, name in zip(results, called, strict=True):
        shares = {"the same best token": result.share("same")}
        if result.top_k > 1:
            shares[f"of the {result.top_k} best tokens"] = result.share("overlap")
        rows += [(name, what, *_share_cells(share), share.verdict) for what, share in shares.items()]
        own = {"token of the same number": result.index_share()}
        if not result.within:
            own[f"token of the same number, {result.other.name}"] = result.index_share(other=True)
        # more of them than chance has would not make features aligned
        rows += [
            (name, what, *_share_cells(share), "more than chance" if share.low > share.chance else CHANCE)
            for what, share in own.items()
        ]
    summaries = "; ".join(
        f"{name} {', '.join(share_lines(result.share()))}"
        for result, name in zip(results, called, strict=True)
    )
    overlaps = [result for result in results if result.top_k > 1]
    parts: list[Plot | Table] = [
        Table(
            ("compared", "share of features", "measured", "95% interval", "chance", "verdict"),
            rows,
            "Shares, mean over pairs of layers",
        ),
        Plot(
            plot_feature_alignment(*results, names=called),
            "Share of features with the same best token in two layers, from 0 (light) to 1 (dark); layer 0 "
            "is at the bottom left. Point at a cell for its interval and chance.",
            f"Heatmaps of the share of features with the same best token, by two layers. Mean: {summaries}.",
            keeps_width=len(results) > 1,
        ),
    ]
    if overlaps:
        kept = [name for result, name in zip(results, called, strict=True) if result.top_k > 1]
        tops = " or ".join(str(top) for top in sorted({result.top_k for result in overlaps}))
        parts.append(
            Plot(
                plot_feature_alignment(*overlaps, names=kept, value="overlap"),
                f"The same of the {tops} best tokens, in any order.",
                f"Heatmaps of the share of the {tops} best tokens that are the same, by two layers.",
                keeps_width=len(overlaps) > 1,
            )
        )
    pairs = [
        (name, one, other, result.share("same", [(one, other)]))
        for result, name in zip(results, called, strict=True)
        for one, other in result.pairs()
    ]
    parts.append(
        Table(
            ("compared", "layer", "with layer", "the same best token", "95% interval", "chance", "verdict"),
            [(name, one, other, *_share_cells(share), share.verdict) for name, one, other, share in pairs],
            "The pairs of layers as a table",
            folded=True,
        )
    )
    compared = " ".join(
        f"{name}: {_pairs_words(result)}, {len(result.features):,} {feature_noun(result.site)}s of "
        f"{place_words(result.site)}"
        + (f" with {place_words(result.other_site)}." if result.other_site != result.site else ".")
        for result, name in zip(results, called, strict=True)
    )
    return Section(
        title,
        f"{text}\n\n{compared}" if text else compared,
        parts,
        feature_terms(*{feature_noun(each.site) for each in results}) | _TERMS,
    )


def _share_cells(share: Share) -> tuple[str | float, ...]:
    interval = "—" if share.low != share.low else f"{number(share.low)} to {number(share.high)}"
    return share.value, interval, chance_words(share)


def _pairs_words(result: FeatureAlignment) -> str:
    if result.within:
        return "each layer with each later one"
    if any(one == other for one, other in result.pairs()):
        return "each layer with the same layer of the other"
    return "each layer with each layer of the other"
