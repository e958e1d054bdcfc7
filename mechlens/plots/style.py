"""What all figures share: colours, the template, and how tokens and other texts are shown."""

from __future__ import annotations

import html
from typing import Any

import plotly.graph_objects as go

# Okabe and Ito's colours, told apart with every common form of colour blindness. Figures never rely
# on hue alone: shape, dash or position says the same, so that they survive a greyscale printer.
BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
INK = "#1f2933"
MUTED = "#5b6770"
GRID = "#e4e7eb"
ABSENT = "#c9ced4"

# Both scales darken with the magnitude; the negative end stays lighter than the positive one, so
# that the sign can be told in greyscale.
SEQUENTIAL = ["#f5f9fd", "#d3e4f3", "#9fc8e3", "#5aa2cf", "#2270b2", "#08306b"]
DIVERGING = ["#a85204", "#dd8a3c", "#f8cf9f", "#f7f7f7", "#9fc8e3", "#2270b2", "#08306b"]

WIDTH = 1100
"""No figure is wider unasked: as wide as the pages that hold it; in pixels."""
HEIGHT = 1400
"""No figure of 30 layers is higher unasked."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_AXIS = {
    "gridcolor": GRID,
    "linecolor": MUTED,
    "tickcolor": MUTED,
    "ticks": "outside",
    "ticklen": 4,
    "zeroline": False,
    "automargin": True,
    "title": {"standoff": 10, "font": {"size": 13}},
}

_BUTTONS = ["zoom2d", "pan2d", "select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"]
_BUTTONS += ["sendChartToCloud", "sendDataToCloud"]

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": [BLUE, VERMILION, GREEN, PURPLE],
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "margin": {"l": 56, "r": 16, "t": 100, "b": 52},
        "title": {
            "x": 0,
            "xanchor": "left",
            "xref": "container",
            # plotly measures it from a first line's middle, where there are more lines
            "pad": {"l": 2, "t": 20},
            "y": 1,
            "yanchor": "top",
            "yref": "container",
            "font": {"size": 15},
        },
        # Beside one another the buttons would cover the title, and as many as plotly has the colour bar: a
        # mouse zooms without them. None may send a chart anywhere.
        "modebar": {"orientation": "v", "remove": _BUTTONS},
        "hoverlabel": {"bgcolor": "white", "bordercolor": MUTED, "font": {"family": FONT, "color": INK}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"},
    }
)


def figure_text(text: str) -> str:
    """Make a text safe for plotly, which reads tags, entities and formulas in every text it draws."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def sequential(share: float) -> tuple[int, int, int]:
    """The colour at a share of the sequential scale, from 0 to 1, as red, green and blue up to 255."""
    place = min(max(share, 0.0), 1.0) * (len(SEQUENTIAL) - 1)
    left = min(int(place), len(SEQUENTIAL) - 2)
    low, high = ([int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in SEQUENTIAL[left : left + 2])
    red, green, blue = (round(a + (b - a) * (place - left)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def is_dark(colour: tuple[int, int, int]) -> bool:
    """Whether white text on this colour has more contrast than ink, by WCAG's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    ink = 0.0215  # of INK
    return (1.05 / (luminance + 0.05)) > ((luminance + 0.05) / (ink + 0.05))


def heatmap(values: Any, *, low: float, high: float, hovers: list[list[str]], **options: Any) -> go.Heatmap:
    """A heatmap on the whole range of its values: diverging around 0 where `low` is negative.

    Args:
        hovers: what stands under the cursor, with texts made safe; cells without a value show nothing.
        options: further properties of the trace.
    """
    ticks = {"tickvals": [low, 0, high]} if low < 0 else {"dtick": (high - low) / 4}
    return go.Heatmap(
        z=values,
        zmin=low,
        zmax=high,
        colorscale=DIVERGING if low < 0 else SEQUENTIAL,
        hovertext=hovers,
        hoverinfo="text",
        hoverongaps=False,
        colorbar={"thickness": 12, "outlinewidth": 0, "ticks": "", **ticks},
        **options,
    )


def top_margin(title: str, more: int = 0) -> int:
    """Room for a title of `titles`, and for plotly's three buttons at the right; in pixels.

    Args:
        more: what stands between the title and the plot, such as ticks.
    """
    return max(100, 46 + round(19.5 * title.count("<br>")) + more)


def titles(title: str, *subtitles: str) -> str:
    """A figure's title with smaller lines below it; the texts are made safe here."""
    lines = [f"<b>{figure_text(title)}</b>"]
    lines += [
        f'<span style="font-size:12px;color:{MUTED}">{figure_text(subtitle)}</span>' for subtitle in subtitles
    ]
    return "<br>".join(lines)
