"""Comparisons in words."""

from __future__ import annotations

import dataclasses

from mechlens.results import Comparison
from mechlens.results.claims import comparisons_table, verdict_statement

GOOD = Comparison("accuracy", 0.93, 0.912361, 0.9, None, "reproduced", "an article")
MISSED = Comparison("score of L5H5", -0.91, float("nan"), 0.88, 0.95, "not reproduced", "an article")


def test_each_kind_of_number_has_its_digits() -> None:
    assert GOOD.row == ("accuracy", "0.9300", "0.9124", "at least 0.90", "reproduced")
    assert MISSED.row[1:4] == ("−0.9100", "not measured", "0.8800 to 0.9500")  # noqa: RUF001
    layers = dataclasses.replace(GOOD, published=20, measured=21, low=19, high=21)
    assert layers.row[1:4] == ("20", "21", "19 to 21")
    assert dataclasses.replace(GOOD, low=None).tolerance == "—"
    assert list(comparisons_table([GOOD]).columns) == [each.name for each in dataclasses.fields(Comparison)]


def test_the_statement_counts_verdicts_and_names_failed_claims() -> None:
    assert verdict_statement([GOOD]) == "1 of 1 claim reproduced (an article)."
    assert verdict_statement([GOOD, MISSED]) == (
        "1 of 2 claims reproduced (an article). Not reproduced: score of L5H5 (published −0.9100, "  # noqa: RUF001
        "measured not measured)."
    )
    open_ = dataclasses.replace(MISSED, verdict="not judged")
    assert verdict_statement([GOOD, open_]) == (
        "1 of 1 claim reproduced (an article). Not judged, because too little was measured: 1."
    )
    assert verdict_statement([GOOD, *[MISSED] * 5]) == (
        "1 of 6 claims reproduced (an article). Not reproduced: 5, listed in the table."
    )
    assert verdict_statement([]) == "Nothing is published about this model at these settings."
