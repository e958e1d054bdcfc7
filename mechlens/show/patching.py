"""A report's section on patching and ablation: a result in, a `Section` out."""

from __future__ import annotations

from mechlens.plots.patching import (
    largest_effects,
    metric_unit,
    metric_words,
    plot_head_effects,
    plot_patch_grid,
    put_there,
)
from mechlens.results import PatchGridResult
from mechlens.show.section import Figure, Section, Table
from mechlens.text.display import number

_TERMS = {
    "Patch": (
        "An activation of one run is replaced, and the run goes on with it: what becomes of the prediction "
        "is the patch's effect."
    ),
    "Effect": "The metric of the patched run less that of the same run without the patch, mean over prompts.",
    "Standard error": "Of the mean effect, over prompts.",
    "Nat": "Unit of information with the natural logarithm: 0.69 nats are one bit.",
}
_RECOVERED = {
    "Recovered": (
        "How far the patch leads from the run that was patched to the other one: 0 is nothing, 1 all the way."
    )
}


def patching_section(
    result: PatchGridResult, *, top: int = 15, title: str = "Patched runs", text: str = ""
) -> Section:
    """The whole grid as a picture, the heads with the largest effects as bars, and the largest as a table.

    A grid of layer x head x position is drawn for the head with the largest effect.

    Args:
        top: how many heads and cells are drawn and listed.
        text: what to look for.

    Raises:
        ValueError: `top` is below 1.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1 cell, but is {top}")
    best = largest_effects(result, top).to_dict("records")
    head = best[0]["head"] if len(result.axes) == 3 and best else None
    named = ", ".join(f"{row['cell']} {number(row['effect'])}" for row in best[:5])
    unit = metric_unit(result.metric)
    what = f"change of the {metric_words(result)}{f' in {unit}' if unit else ''}"
    parts: list[Figure | Table] = [
        Figure(
            plot_patch_grid(result, head=head),
            f"The {what} by each patch of {result.site} ({put_there(result)}); blue raises it, orange lowers "
            "it. Point at a cell for its numbers."
            + (f" Drawn is head {head}, which has the largest effect." if head is not None else ""),
            f"The {what} by {' and '.join(result.axes)}. Largest: {named}.",
            keeps_width="pos" in result.axes,
            wide="pos" in result.axes,
        )
    ]
    several, recovers = len(result.tokens) > 1, not bool(result.recovered.isnan().all())
    if recovers:
        parts.append(
            Figure(
                plot_patch_grid(result, value="recovered", head=head),
                "The same as a share of the difference between the two runs: 1 is all the way.",
                f"Share of the way to the other run by {' and '.join(result.axes)}.",
                keeps_width="pos" in result.axes,
                wide="pos" in result.axes,
            )
        )
    if result.axes == ("layer", "head"):
        parts.append(
            Figure(
                plot_head_effects(result, top=top),
                f"The heads whose patch changes the {result.metric} most"
                + (", with standard errors over prompts." if len(result.tokens) > 1 else "."),
                f"Largest effects: {named}.",
                wide=False,
            )
        )
    columns = {"patched": "cell", "change": "effect"}
    columns |= {"standard error": "standard_error"} if several else {}
    columns |= {f"{result.metric} of the patched run": "mean"}
    columns |= {"recovered": "recovered"} if recovers else {}
    rows = [tuple(row[name] for name in columns.values()) for row in best]
    parts.append(Table(tuple(columns), rows, f"The {len(best)} largest changes as a table", folded=True))
    n_prompts = len(result.tokens)
    said = (
        f"{n_prompts} prompt{'s' if n_prompts != 1 else ''} of {result.tokens.shape[1]} tokens. Without a "
        f"patch the {metric_words(result)} is {number(float(result.clean.mean()))}"
        + (f", in the corrupted run {number(float(result.corrupted.mean()))}" if recovers else "")
        + "."
        + (f" Note: {result.note}." if result.note else "")
    )
    terms = {
        term: meaning
        for term, meaning in _TERMS.items()
        if (term != "Nat" or unit == "nats") and (term != "Standard error" or several)
    }
    return Section(
        title, f"{text}\n\n{said}" if text else said, parts, terms | (_RECOVERED if recovers else {})
    )
