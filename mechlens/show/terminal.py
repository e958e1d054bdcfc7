"""Sections in a terminal, and results as JSON for other programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mechlens.show.section import Cell, Section, Table

if TYPE_CHECKING:
    from rich.text import Text

    from mechlens.results import Comparison


def print_section(section: Section, *, of: str = "") -> None:
    """Print a section's title, its text, and the tables that a terminal shows.

    Args:
        of: the model's name, for the title.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(
        Text(f"{section.title} ({of})" if of and of not in section.title else section.title, style="bold"),
        soft_wrap=True,
    )
    for paragraph in filter(None, section.text.split("\n\n")):
        console.print(Text(" ".join(paragraph.split())), soft_wrap=not console.is_terminal)
    for table in section.tables("terminal"):
        print_table(table)


def print_table(table: Table) -> None:
    """Print a table under its caption; outside a terminal, as wide as it needs to be."""
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    if table.dense:
        _print_dense(table)
        return
    drawn = Drawn()
    for at, heading in enumerate(table.headings):
        drawn.add_column(heading, overflow="fold", justify="right" if table.is_number(at) else "left")
    for row in table.cells():
        drawn.add_row(*map(_text, row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=Console(width=10_000).measure(drawn).maximum, highlight=False)
    console.print(Text(table.caption, style="bold"), soft_wrap=True)
    console.print(drawn)


def _print_dense(table: Table) -> None:
    """Print a table without lines, in blocks as wide as the terminal that each repeat the first column."""
    from rich.cells import cell_len, set_cell_size
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(table.caption, style="bold"), soft_wrap=True)
    if table.shades:
        colored = console.color_system is not None and not console.no_color
        console.print(
            f"{'Color' if colored else 'Not shown without colors'}: {table.shades}",
            soft_wrap=True,
            markup=False,
        )
    lines = [[Cell(heading, strong=True) for heading in table.headings], *table.cells()]
    sizes = [max(cell_len(line[at].text) for line in lines) for at in range(len(table.columns))]
    stretches: list[list[int]] = []
    used = console.width
    for at in range(1, len(sizes)):
        if used + 1 + sizes[at] > console.width:
            stretches.append([])
            used = sizes[0]
        stretches[-1].append(at)
        used += 1 + sizes[at]
    for stretch in stretches:
        console.print()
        for line in lines:
            text = Text(line[0].text.rjust(sizes[0]), "bold" if line[0].strong else "")
            for at in stretch:
                text.append(" ")
                text.append(set_cell_size(line[at].text, sizes[at]), shaded_style(line[at]))
            text.truncate(console.width)
            console.print(text, no_wrap=True, crop=False, overflow="ignore")


def print_comparisons(comparisons: Sequence[Comparison]) -> None:
    """Print measured numbers beside published ones, and how many claims were reproduced."""
    from mechlens.results import Comparison
    from mechlens.results.claims import verdict_statement

    if comparisons:
        rows = [each.row for each in comparisons]
        print_table(Table(Comparison.columns, rows, "Published and measured"))
    print(verdict_statement(comparisons))


def shaded_style(cell: Cell) -> str:
    """The style of a cell: its background, a readable text color, and bold type."""
    from mechlens.text.color import is_dark, sequential

    ground = ""
    if not math.isnan(cell.shade):
        color = sequential(cell.shade)
        ground = f"{'#ffffff' if is_dark(color) else '#000000'} on #{{:02x}}{{:02x}}{{:02x}}".format(*color)
    return f"{ground} {'bold' if cell.strong else ''}".strip()


def _text(cell: Cell) -> Text:
    from rich.text import Text

    return Text(cell.text, shaded_style(cell) if cell.strong or not math.isnan(cell.shade) else "")


def print_json(value: Any) -> None:
    """Print one JSON value. JSON has neither nan nor infinity, so both are null."""
    print(json.dumps(_finite(value), indent=2, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain(value: Any) -> str:
    """A value of a model summary, as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else "unknown" if value is None else str(value)
