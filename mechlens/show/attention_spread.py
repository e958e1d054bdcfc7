"""The section on attention spread."""

from __future__ import annotations

import mechlens
from mechlens.results import AttentionSpread
from mechlens.show.section import Figure, Section, Table
from mechlens.text.display import count


def spread_section(result: AttentionSpread, *, top: int = 10, title: str = "Attention spread") -> Section:
    """The most focused heads as a table, and a heatmap of each measure."""
    n, n_pos = result.tokens.shape
    caption = "The most focused heads that do not rest on the first token"
    table = Table.of(result.summary(top), result.columns, caption)
    figures = [_figure(result, measure) for measure in result.measures]
    return Section(title, f"{count(n, 'sequence')} of {count(n_pos, 'token')}.", [table, *figures])


def _figure(result: AttentionSpread, measure: str) -> Figure:
    column = result.column(measure)
    caption = f"{column.heading.capitalize()}. {column.help} Hover for numbers."
    return Figure(lambda: mechlens.plot_attention_spread(result, measure), caption, wide=False)


SECTIONS = {AttentionSpread: spread_section}
