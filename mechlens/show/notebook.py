"""Sections in Jupyter: text and tables as HTML, and figures."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from mechlens.show.page import paragraphs, table_html

if TYPE_CHECKING:
    from mechlens.show.section import Section


def display_section(section: Section) -> None:
    """Show a section as the output of a cell."""
    from IPython.display import HTML, display

    from mechlens.show.section import Table

    display(HTML(f"<h3>{escape(section.title)}</h3>{paragraphs(section.text)}"))
    for part in section.parts:
        if not isinstance(part, Table):
            display(part.figure)
            display(HTML(f"<small>{escape(part.caption)}</small>"))
        elif part.where != "terminal":
            display(HTML(table_html(part)))
