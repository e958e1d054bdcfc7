"""What a result's columns are called, and how their values are written, wherever they are shown."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

from mechlens.text.display import ABSENT, number


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table: its name in code, and its title and format for readers."""

    name: str
    """In `to_dataframe()`, `.csv` and JSON."""
    title: str = ""
    """In tables and on axes; if empty, the name with spaces."""
    unit: str = ""
    """Such as `nats`; empty for counts, shares and names."""
    digits: int = 3
    """Decimals of a number that is not an integer."""
    signed: bool = False
    """Whether positive numbers are written with a plus sign."""
    help: str = ""
    """Definition, in one sentence."""

    @property
    def words(self) -> str:
        """The title, or the name with spaces."""
        return self.title or self.name.replace("_", " ")

    @property
    def heading(self) -> str:
        """The words with the unit: `effect, nats`."""
        return f"{self.words}, {self.unit}" if self.unit else self.words

    def text(self, value: Any) -> str:
        """A value of this column as text; a dash if it is missing (None or nan)."""
        # pandas's own missing value is neither true nor false
        if value is None or type(value).__name__ == "NAType" or value != value:
            return ABSENT
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, numbers.Integral):
            return f"{int(value):,}"
        if isinstance(value, numbers.Real):
            return number(float(value), self.digits, signed=self.signed)
        return str(value)


def column(name: str | Column) -> Column:
    """A column, given as one or by its name alone."""
    return name if isinstance(name, Column) else Column(name)
