"""Sections as Markdown, for pages of the documentation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mechlens.show.section import Section, Table


def section_markdown(section: Section) -> str:
    """A section's title, text and tables, each table under its caption."""
    tables = [f"{table.caption}:\n\n{table_markdown(table)}" for table in section.tables("page")]
    return "\n\n".join(filter(None, [f"## {section.title}", section.text, *tables])) + "\n"


def table_markdown(table: Table) -> str:
    """A table, without its caption."""
    rows = [[cell.text for cell in row] for row in table.cells()]
    lines = [table.headings, ["---"] * len(table.columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
