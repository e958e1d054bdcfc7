"""Numbers as people read them."""

from __future__ import annotations

import pytest

from mechlens.text.display import number


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        (-1.5, {}, "\N{MINUS SIGN}1.500"),
        (-0.0004, {}, "0.000"),
        (-0.0004, {"signed": True}, "0.000"),
        (0.0004, {"signed": True}, "+0.000"),
        (-0.0005001, {}, "\N{MINUS SIGN}0.001"),
        (-0.4, {"digits": 0}, "0"),
        (float("nan"), {}, "not measured"),
        (float("-inf"), {}, "\N{MINUS SIGN}inf"),
    ],
)
def test_a_number_has_a_real_minus_sign_but_none_before_zero(value, options, text):
    assert number(value, **options) == text
