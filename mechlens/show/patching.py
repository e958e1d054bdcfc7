"""The section on patching and ablation."""

from __future__ import annotations

from mechlens.errors import ArgumentError
from mechlens.results import AttributionPatchResult, PatchGridResult
from mechlens.results.patching import EFFECT, RECOVERED
from mechlens.show.section import Figure, Section, Table, drawn, joined
from mechlens.text.display import number

_TERMS = {
    "Patch": "An activation of one run is replaced, and the run continues with the new value.",
    "Effect": EFFECT,
    "Standard error": "Of the mean effect, over prompts.",
    "Nat": "Unit of information with the natural logarithm: 0.69 nats are one bit.",
    "Recovered": RECOVERED,
}


def patching_section(
    result: PatchGridResult | AttributionPatchResult,
    *,
    top: int = 15,
    title: str = "Patched runs",
    text: str = "",
) -> Section:
    """The whole grid as a heatmap, the heads with the largest effects as bars, and a table of effects.

    Args:
        top: number of heads to draw and of cells to list.
        title: the heading.
        text: a paragraph before the others.

    Raises:
        ValueError: `top` is below 1.
    """
    if top < 1:
        raise ArgumentError("top", "at least 1", top)
    best = result.largest(top).to_dict("records")
    named = ", ".join(f"{row['cell']} {number(row['effect'])}" for row in best[:5])
    unit = f" in {result.unit}" if result.unit else ""
    what = f"change of the {result.about_metric}{unit}"
    at_positions, several = "pos" in result.axes, len(result.tokens) > 1
    pictures = [
        Figure(
            drawn("plot_patch_grid", result),
            f"The {what} by each patch of {result.site} ({result.put_there}): blue raises it, orange lowers "
            "it. Hover for numbers.",
            f"The {what} by {' and '.join(result.axes)}. Largest: {named}.",
            keeps_width=at_positions,
            wide=at_positions,
        )
    ]
    if result.has_recovered:
        pictures.append(
            Figure(
                drawn("plot_patch_grid", result, value="recovered"),
                "The same as a share of the difference between the two runs: 1 is all of it.",
                f"Share of the way to the other run by {' and '.join(result.axes)}.",
                keeps_width=at_positions,
                wide=at_positions,
            )
        )
    if result.axes == ("layer", "head"):
        errors = ", with standard errors over prompts" if several else ""
        pictures.append(
            Figure(
                drawn("plot_head_effects", result, top=top),
                f"The heads with the largest effects{errors}.",
                f"Largest effects: {named}.",
                wide=False,
            )
        )
    note = getattr(result, "note", "")
    effects = result.said_of_effects() if isinstance(result, PatchGridResult) else ""
    said = f"{' '.join(filter(None, (result.describe(), effects)))}{f' Note: {note}.' if note else ''}"
    told = {"Nat": result.unit == "nats", "Standard error": several, "Recovered": result.has_recovered}
    caption = f"The {len(best)} largest effects; patched with: {result.put_there}"
    return Section(
        title,
        joined(text, said),
        [
            *(pictures if result.axes else []),
            Table.of(result.summary(top), result.columns, caption, folded=True),
        ],
        {term: meaning for term, meaning in _TERMS.items() if told.get(term, True)},
    )


SECTIONS = {PatchGridResult: patching_section, AttributionPatchResult: patching_section}
