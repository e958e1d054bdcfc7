"""Published claims next to measured numbers, and the verdicts on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from mechlens.results.columns import Column
from mechlens.text.display import ABSENT, count, number

if TYPE_CHECKING:
    import pandas as pd

REPRODUCED, NOT_REPRODUCED, NOT_JUDGED = "reproduced", "not reproduced", "not judged"
MOST_NAMED = 4
"""At most this many claims that were not reproduced are named in the sentence; the table has all."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One published claim next to the measured number."""

    claim: str
    """What is measured, with its unit, such as `induction score of L5H5`."""
    published: float | str
    measured: float | str
    low: float | None
    """Lower end of what counts as agreement; None if there is none."""
    high: float | None
    verdict: str
    """`reproduced`, `not reproduced`, or `not judged` where too little was measured."""
    source: str

    columns: ClassVar[tuple[Column, ...]] = (
        Column("claim"),
        Column("published"),
        Column("measured"),
        Column("tolerance", help="Where the compared number must lie for the claim to count as reproduced."),
        Column("verdict"),
    )

    @property
    def tolerance(self) -> str:
        """What counts as agreement, such as `0.9100 to 0.9500` or `at least 0.90`."""
        if self.low is not None and self.high is not None:
            return f"{_value(self.low)} to {_value(self.high)}"
        if self.low is not None:
            return f"at least {number(self.low, 2)}"
        return ABSENT if self.high is None else f"at most {number(self.high, 2)}"

    @property
    def row(self) -> tuple[str, ...]:
        """The values of `columns` as text."""
        return self.claim, _value(self.published), _value(self.measured), self.tolerance, self.verdict


def verdict_of(holds: bool | None) -> str:
    """The verdict on a claim that is true, false, or (None) cannot be judged."""
    return NOT_JUDGED if holds is None else REPRODUCED if holds else NOT_REPRODUCED


def comparisons_table(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """One row per comparison: claim, published, measured, low, high, verdict, source."""
    import pandas as pd

    names = [field.name for field in dataclasses.fields(Comparison)]
    return pd.DataFrame([dataclasses.asdict(each) for each in comparisons], columns=names)


def verdict_statement(comparisons: Sequence[Comparison]) -> str:
    """How many claims were reproduced, and, if they are few, which ones were not."""
    if not comparisons:
        return "Nothing is published about this model at these settings."
    judged = [each for each in comparisons if each.verdict != NOT_JUDGED]
    missed = [each for each in judged if each.verdict != REPRODUCED]
    sources = " and ".join(dict.fromkeys(each.source for each in comparisons))
    statement = f"{len(judged) - len(missed)} of {count(len(judged), 'claim')} reproduced ({sources})."
    if len(judged) < len(comparisons):
        statement += f" Not judged, because too little was measured: {len(comparisons) - len(judged)}."
    if len(missed) > MOST_NAMED:
        statement += f" Not reproduced: {len(missed)}, listed in the table."
    elif missed:
        named = (f"{claim} (published {said}, measured {found})" for claim, said, found, *_ in _rows(missed))
        statement += f" Not reproduced: {'; '.join(named)}."
    return statement


def _rows(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    return [each.row for each in comparisons]


def _value(value: float | str) -> str:
    """A value as text; integers, such as layer numbers, have no decimals."""
    return value if isinstance(value, str) else number(value, 0 if isinstance(value, int) else 4)
