"""Properties that all figures share, for models with 4 and 30 layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import plotly.graph_objects as go
import pytest

import mechlens
from mechlens.plots.style import HEIGHT, WIDTH, titles, top_margin
from tests.plots import gallery

ASKED_FOR = {"plot_circuit_corner", "plot_eigenvalues", "plot_gradient_search"}
"""Figures whose size does not depend on the number of layers."""


@functools.cache
def figures(n_layers: int) -> dict[str, go.Figure]:
    return gallery.figures(n_layers)


def _sizes(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every font size in a figure, with its place."""
    if isinstance(value, dict):
        for name, each in value.items():
            if name == "size" and key.endswith("font"):
                yield from ((key, size) for size in (each if isinstance(each, (list, tuple)) else [each]))
            yield from _sizes(each, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _sizes(each, key)


def test_every_figure_is_in_the_gallery(monkeypatch):
    drawn = set()
    names = [name for name in mechlens.__all__ if name.startswith("plot_")]
    for name in names:
        draw = getattr(mechlens, name)

        def noted(*args, name=name, draw=draw, **options):
            drawn.add(name)
            return draw(*args, **options)

        monkeypatch.setattr(mechlens, name, noted)
    gallery.figures(4)
    views = {name for name in names if name in ("plot_attention", "plot_feature_examples")}
    assert drawn == set(names) - views - ASKED_FOR


@pytest.mark.parametrize("n_layers", [4, 30])
def test_no_figure_is_larger_than_a_page(n_layers):
    for name, figure in figures(n_layers).items():
        layout = figure.layout
        assert layout.width is not None, name
        assert layout.height is not None, name
        assert 500 <= layout.width <= WIDTH, name
        assert 200 <= layout.height <= HEIGHT, name


@pytest.mark.parametrize("n_layers", [4, 30])
def test_text_is_legible(n_layers):
    for name, figure in figures(n_layers).items():
        sizes = list(_sizes(figure.to_plotly_json()))
        assert all(size >= 9 for _, size in sizes), (name, sizes)


@pytest.mark.parametrize("n_layers", [4, 30])
def test_buttons_are_above_color_bars_and_legends(n_layers):
    for name, figure in figures(n_layers).items():
        template, layout = figure.layout.template.layout, figure.layout
        bar = template.modebar
        # stacked at the right end: the logo, back, and save, at 22 pixels each plus gaps
        assert bar.orientation == "v", name
        kept = {"zoom2d", "pan2d", "select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"}
        assert kept | {"sendChartToCloud"} <= set(bar.remove), name
        assert layout.modebar.orientation is None, name
        room = template.margin.t if layout.margin.t is None else layout.margin.t
        # measured in Chromium: 90
        assert room >= 98, name
        lines = layout.title.text.count("<br>")
        # the first line, and 19.5 pixels for each further line
        assert room >= 28 + 19.5 * lines, name


def test_a_title_of_many_lines_has_room():
    short, long = titles("One", "two"), titles("One", *"abcdefg")
    assert top_margin(short) == 100
    assert top_margin(long) >= 28 + 7 * 19.5
    assert top_margin(long, 30) == top_margin(long) + 30
