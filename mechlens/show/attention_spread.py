"""The section on attention spread."""

from __future__ import annotations

from functools import partial

import mechlens
from mechlens.results import AttentionSpread
from mechlens.show.section import Figure, Section, Table
from mechlens.text.display import count


def spread_section(result: AttentionSpread, *, top: int = 10, title: str = "Attention spread") -> Section:
    """A heatmap of each measure, and the most focused heads as a table."""
    n, n_pos = result.tokens.shape
    figures = [
        Figure(
            partial(mechlens.plot_attention_spread, result, measure),
            f"{column.heading.capitalize()}. {column.help} Hover for numbers.",
            wide=False,
        )
        for measure in result.measures
        for column in [result.column(measure)]
    ]
    table = Table.of(
        result.summary(top), result.columns, "The most focused heads not at rest on the first token"
    )
    return Section(title, f"{count(n, 'sequence')} of {count(n_pos, 'token')}.", [table, *figures])


SECTIONS = {AttentionSpread: spread_section}
