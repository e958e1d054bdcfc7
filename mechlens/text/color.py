"""The colors of values, in figures, on pages and in terminals."""

from __future__ import annotations

SEQUENTIAL = ["#f5f9fd", "#d3e4f3", "#9fc8e3", "#5aa2cf", "#2270b2", "#08306b"]


def sequential(share: float) -> tuple[int, int, int]:
    """The color at a fraction (0 to 1) of the sequential scale: red, green and blue, each 0 to 255."""
    place = min(max(share, 0.0), 1.0) * (len(SEQUENTIAL) - 1)
    left = min(int(place), len(SEQUENTIAL) - 2)
    low, high = ([int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in SEQUENTIAL[left : left + 2])
    red, green, blue = (round(a + (b - a) * (place - left)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def is_dark(color: tuple[int, int, int]) -> bool:
    """Whether white text has more contrast on this color than ink, by WCAG's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    ink = 0.0215  # of INK
    return (1.05 / (luminance + 0.05)) > ((luminance + 0.05) / (ink + 0.05))
