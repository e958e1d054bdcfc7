"""A report's section on direct logit attribution: a result in, a `Section` out."""

from __future__ import annotations

from mechlens.plots.attribution import attribution_title, largest_parts, plot_attribution
from mechlens.plots.style import number
from mechlens.results import LogitAttribution
from mechlens.show.page import Plot, Section, Table

_TERMS = {
    "Direct attribution": (
        "A logit is linear in what each component writes into the residual stream, once the last norm's "
        "division is held; what a component does through later ones counts as theirs."
    ),
    "Logit": "Score of a token before the softmax; a difference of two is a log ratio of probabilities.",
}


def attribution_section(
    result: LogitAttribution,
    *,
    row: int = 0,
    position: int = -1,
    largest: int = 12,
    title: str = "Direct logit attribution",
    text: str = "",
) -> Section:
    """The picture at one position, and the largest parts as a table.

    Args:
        text: what to look for.

    Raises:
        ValueError: as `plot_attribution`.
    """
    figure = plot_attribution(result, row=row, position=position, largest=largest)
    parts = largest_parts(result, row=row, position=position, largest=largest)
    named = ", ".join(f"{name} {number(value)}" for name, value in list(parts.items())[:5])
    said = "; ".join(attribution_title(result, row=row, position=position))
    return Section(
        title,
        text,
        (
            Plot(
                figure,
                "What each component adds to the logit: blue speaks for the token, orange against it. "
                "Point at a cell for its numbers.",
                f"{said}. Largest: {named}.",
                keeps_width=True,
            ),
            Table(
                ("component", "added to the logit"),
                list(parts.items()),
                f"The {len(parts)} bars as a table",
                folded=True,
            ),
        ),
        _TERMS,
    )
