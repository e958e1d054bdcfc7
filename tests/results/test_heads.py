"""The rule for a head to be clearly of a kind."""

from __future__ import annotations

import pytest

from tests.examples import head_scores


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(1, 2), (0, 2)]),
        # every null is 0.0625
        ({"times_null": 10.0}, [(1, 2)]),
        ({"threshold": 0.2, "times_null": 4.0}, [(1, 2), (0, 2), (0, 1)]),
        ({"threshold": 0.2}, [(1, 2), (0, 2)]),
        ({"threshold": 0.0, "times_null": 0.0}, [(1, 2), (0, 2), (0, 1), (0, 0), (1, 0)]),
    ],
)
def test_clear_heads_pass_the_threshold_and_the_multiple_of_their_null(options, expected):
    assert [head for head, _ in head_scores().clear_heads("induction_score", **options)] == expected


def test_clear_heads_of_a_kind_without_a_null_need_no_multiple():
    with pytest.raises(ValueError, match=r"kind must be one of .*got 'copying_score'"):
        head_scores().clear_heads("copying_score")
    clear = head_scores().clear_heads("copying_score", threshold=0.5, times_null=0)
    assert clear == [((1, 0), 1.0), ((1, 2), 0.75)]
