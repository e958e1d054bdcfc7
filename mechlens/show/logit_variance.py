"""The section on how logits vary over layers."""

from __future__ import annotations

import mechlens
from mechlens.results import LogitVariance
from mechlens.show.section import Figure, Section, Table, joined
from mechlens.text.display import number

_TERMS = {
    "Variance over layers": "Variance of a token's logit over the layers of the logit lens.",
    "Final rank": "A token's rank in the model's own prediction at the position; 1 is the most likely.",
    "Random bins": "The same tokens assigned at random to bins of the same sizes.",
}


def logit_variance_section(
    result: LogitVariance, *, title: str = "Logits of improbable tokens", text: str = ""
) -> Section:
    """How much logits move over layers, by the token's final rank."""
    found = result.estimates()
    low, high = number(found["null_ratio_low"], 2), number(found["null_ratio_high"], 2)
    said = (
        "Variance of the least probable bin over that of the most probable: "
        f"{number(found['variance_ratio'], 2)}; in random bins {low} to {high}; with ranks from another "
        f"position {number(found['elsewhere_ratio'], 2)}."
    )
    figure = Figure(
        lambda: mechlens.plot_logit_variance(result),
        "Mean logit, spread, distance from the final logit, and variance over layers, by final rank.",
        said,
    )
    table = Table.of(result.summary(), result.columns, "Variance over layers by final rank", folded=True)
    return Section(title, joined(text, said), (figure, table), _TERMS)


SECTIONS = {LogitVariance: logit_variance_section}
