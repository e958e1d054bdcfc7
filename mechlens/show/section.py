"""Sections: the text, tables and figures of a result, independent of what renders them."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import mechlens
from mechlens.results.columns import Column, column

if TYPE_CHECKING:
    import pandas as pd

    from mechlens.results import Result


@dataclasses.dataclass(frozen=True)
class Cell:
    """A table cell with a colored background."""

    text: str
    shade: float = float("nan")
    """Share of the sequential color scale, from 0 (light) to 1 (dark); nan for no color."""
    strong: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """A table in a section. Each column formats its own values; numbers are right-aligned."""

    columns: Sequence[Column | str]
    rows: Sequence[Sequence[Any]]
    """Values by column: numbers, strings, `Cell`s, or None where there is no value."""
    caption: str
    folded: bool = False
    """Whether a page hides it until the reader opens it."""
    where: Literal["everywhere", "terminal", "page"] = "everywhere"
    """Which renderer shows it; a notebook shows what a page does."""
    dense: bool = False
    """Whether a terminal draws it without lines, and in several blocks if it is wide."""
    shades: str = ""
    """What the background of its `Cell`s means, with its range."""

    @classmethod
    def of(cls, frame: pd.DataFrame, columns: Sequence[Column], caption: str, **options: Any) -> Table:
        """Some columns of a data frame, in this order."""
        return cls(columns, frame[[each.name for each in columns]].to_numpy().tolist(), caption, **options)

    @property
    def headings(self) -> tuple[str, ...]:
        return tuple(column(each).heading for each in self.columns)

    def cells(self) -> list[list[Cell]]:
        """Every value as text."""
        columns = [column(each) for each in self.columns]
        return [
            [
                value if isinstance(value, Cell) else Cell(each.text(value))
                for value, each in zip(row, columns, strict=True)
            ]
            for row in self.rows
        ]

    def is_number(self, at: int) -> bool:
        """Whether a column holds numbers."""
        return any(isinstance(row[at], (int, float)) and row[at] == row[at] for row in self.rows)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture of a section: a plotly figure or a circuitsvis view."""

    draw: Callable[[], Any] | Any
    """The figure, or a function that draws it. A terminal never calls it, and so never loads plotly."""
    caption: str
    """How to read the figure, and its unit."""
    description: str = ""
    """What it shows, for readers who cannot see it."""
    wide: bool = True
    """Whether it takes the page's whole width; two narrow ones share a row."""
    keeps_width: bool = False
    """Whether it keeps its own width, and scrolls sideways where the page is narrower."""

    @property
    def figure(self) -> Any:
        """The picture, drawn."""
        return self.draw() if callable(self.draw) else self.draw


def drawn(name: str, *given: Any, **options: Any) -> Callable[[], Any]:
    """A function that draws a `Figure` with a public function of mechlens, and loads plotly only then."""
    return lambda: getattr(mechlens, name)(*given, **options)


def joined(*texts: str) -> str:
    """Paragraphs of a section's text; empty ones are left out."""
    return "\n\n".join(filter(None, texts))


@dataclasses.dataclass(frozen=True)
class Section:
    """What to show of a result, under a heading of its own; Jupyter displays it."""

    title: str
    text: str = ""
    """Plain text; an empty line starts a paragraph."""
    parts: Sequence[Table | Figure] = ()
    terms: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Definitions of the section's terms; a page collects them in one list."""

    def tables(self, where: str) -> list[Table]:
        """The tables that one renderer shows."""
        return [
            part for part in self.parts if isinstance(part, Table) and part.where in ("everywhere", where)
        ]

    def _ipython_display_(self) -> None:
        from mechlens.show.notebook import display_section

        display_section(self)


def section(result: Result, **options: Any) -> Section:
    """Make the section that shows a result.

    Args:
        result: any result of mechlens.
        options: options of this kind of section, such as `top`, the number of rows to list. `title` replaces
            the heading; `text` adds a paragraph before the others.

    Raises:
        TypeError: there is no section for this type of result, or no such option.

    Example:
        >>> found = mechlens.direct_logit_attribution(model, "The captain of the")
        >>> mechlens.section(found, top=3).title
        'Direct logit attribution'
    """
    from mechlens.arguments import check_type
    from mechlens.results import Result

    check_type("result", result, Result)
    home = type(result).__module__.rsplit(".", 1)[1]
    makers = getattr(importlib.import_module(f"mechlens.show.{home}"), "SECTIONS", {})
    if type(result) not in makers:
        raise TypeError(f"there is no section for a {type(result).__name__}")
    made: Section = makers[type(result)](result, **options)
    return made
