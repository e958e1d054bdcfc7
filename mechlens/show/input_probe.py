"""The section on recovering the input token from the residual stream."""

from __future__ import annotations

import mechlens
from mechlens.results import InputProbe
from mechlens.show.section import Figure, Section, Table, joined

_TERMS = {
    "Input probe": "A linear map from the residual stream to the embedding of the token at that position.",
    "Random maps": "Maps with the same singular values and random singular vectors: what any map would give.",
    "Importance": "A direction's share of the variance of the embedding matrix.",
}


def input_probe_section(
    result: InputProbe, *, title: str = "The input, recovered from the residual stream", text: str = ""
) -> Section:
    """Accuracy and properties of the maps, by row."""
    own = result.accuracy["embedding"][0]
    said = (
        f"Share of held-out tokens recovered: {float(own[0]):.3f} at the embedding, {float(own[-1]):.3f} "
        f"after the last layer; {result.chance:.3f} by always guessing the most frequent token."
    )
    figure = Figure(
        lambda: mechlens.plot_input_probe(result),
        "Accuracy by row, and each map beside random maps with the same singular values (gray).",
        said,
    )
    n_rows = len(result.rows)
    table = Table.of(
        result.summary(n_rows), result.columns, f"Maps to the embedding ({result.maps[0]})", folded=True
    )
    return Section(title, joined(text, said), (figure, table), _TERMS)


SECTIONS = {InputProbe: input_probe_section}
