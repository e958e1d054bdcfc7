"""Words and signs in a natural order, each with the space before it."""

from __future__ import annotations

import string

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_NUMBERS = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_ORDINALS = (
    *("first", "second", "third", "fourth", "fifth"),
    *("sixth", "seventh", "eighth", "ninth", "tenth"),
)
SUCCESSIONS = {
    name: tuple(f" {word}" for word in words)
    for name, words in {
        "numerals": [str(number) for number in range(1, 201)],
        "number words": _NUMBERS,
        "ordinal words": _ORDINALS,
        "days": (*_DAYS, _DAYS[0]),
        "months": (*_MONTHS, _MONTHS[0]),
        "abbreviated days": [day[:3] for day in (*_DAYS, _DAYS[0])],
        "abbreviated months": [month[:3] for month in (*_MONTHS, _MONTHS[0])],
        "letters": string.ascii_uppercase,
    }.items()
}
"""The classes of Gould et al. 2023, arXiv:2312.09230. The first of days and months is also the last."""
