"""The section on direct logit attribution."""

from __future__ import annotations

import mechlens
from mechlens.results import LogitAttribution
from mechlens.show.features import feature_terms
from mechlens.show.section import Figure, Section, Table, joined

_TERMS = {
    "Direct attribution": (
        "A logit is linear in what each component writes into the residual stream once the scale of the last "
        "norm is held fixed. What a component does through later components counts toward those."
    ),
    "Logit": "A token's score before the softmax. The difference of two is the log of a probability ratio.",
}


def attribution_section(
    result: LogitAttribution, *, top: int = 12, title: str = "Direct logit attribution", text: str = ""
) -> Section:
    """The figure at the last position, the `top` components as a table, and the listed neurons as another."""
    said = "; ".join(result.describe())
    neurons, terms = [], dict(_TERMS)
    if result.neurons is not None:
        caption = (
            "Neurons with the largest contributions; a negative activation swaps promoted and suppressed"
        )
        neurons = [Table.of(result.neuron_summary(), result.neuron_columns, caption)]
        terms |= feature_terms("neuron")
    return Section(
        title,
        joined(text, f"{said}."),
        (
            Figure(
                lambda: mechlens.plot_attribution(result, largest=top),
                "What each component adds to the logit: blue raises it, orange lowers it. Hover for numbers.",
                said,
                keeps_width=True,
            ),
            Table.of(result.summary(top), result.columns, "The largest components", folded=True),
            *neurons,
        ),
        terms,
    )


SECTIONS = {LogitAttribution: attribution_section}
