"""The input-probe figure on a result with known values."""

from __future__ import annotations

import dataclasses

import pytest

from mechlens.plots.input_probe import plot_input_probe
from tests import examples


def traces(figure):
    return {trace.name: trace for trace in figure.data}


def test_every_number_is_at_its_row_and_basis():
    found = traces(plot_input_probe(examples.input_probe()))
    own, shared = found["accuracy embedding per_layer"], found["accuracy embedding shared"]
    assert own.y == (1.0, 0.5)
    assert shared.y == (0.0, 0.75)
    # two bases, half of 0.18 to either side of the row
    assert own.x == pytest.approx((-0.09, 0.91))
    assert found["accuracy pca per_layer"].x == pytest.approx((0.09, 1.09))
    assert found["similarity embedding"].y == (1.0, 0.5, 0.0)
    assert found["similarity pca"].y == (0.5, 0.25, 0.0)
    assert found["unembedding_similarity embedding"].y == (-1.0, -0.5, 0.0)
    assert found["weight_correlation embedding"].y == (0.5, 0.0, -0.5)
    null = found["similarity embedding null"]
    assert null.y == (-0.25, 0.125, None) * 3
    assert null.x[:2] == pytest.approx((-0.09, -0.09))
    assert found["most frequent token"].y == (0.0625, 0.0625)


def test_separate_and_shared_maps_differ_by_more_than_color():
    found = traces(plot_input_probe(examples.input_probe()))
    own, shared = found["accuracy embedding per_layer"], found["accuracy embedding shared"]
    assert (own.line.dash, shared.line.dash) == ("solid", "dash")
    assert (own.marker.symbol, shared.marker.symbol) == ("circle", "circle-open")
    assert found["accuracy pca per_layer"].marker.symbol == "square"


def test_hovering_shows_the_numbers_and_their_nulls():
    found = traces(plot_input_probe(examples.input_probe()))
    assert found["accuracy embedding per_layer"].hovertext[1] == (
        "<b>0</b>, embedding, map of the row<br>accuracy 0.500 (0.375 to 0.625)<br>R² 0.250"
    )
    assert found["similarity embedding"].hovertext[2] == (
        "<b>shared</b>, embedding<br>0.000<br>random maps 0.000 (\N{MINUS SIGN}0.250 to 0.125)"
    )
    assert "not measured" in found["weight_correlation pca"].hovertext[0]


def test_only_the_shared_map():
    both = examples.input_probe()
    fields = ("accuracy", "accuracy_interval", "r2", "element_r2")
    per_fit = ("weights", "biases", "weight", "similarity", "unembedding_similarity", "weight_correlation")
    per_fit += tuple(f"{name}_null" for name in per_fit[3:])
    last = {
        name: {basis: value[-1:] for basis, value in getattr(both, name).items()}
        for name in (*fields, *per_fit)
    }
    alone = dataclasses.replace(both, maps=("shared",), fits=("shared",), **last)
    figure = plot_input_probe(alone)
    found = traces(figure)
    assert found["accuracy embedding shared"].y == (0.0, 0.75)
    assert "map of the row" not in found
    assert figure.layout.xaxis2.ticktext == ("shared",)
    assert "0.375 on average by the shared map" in figure.layout.title.text


def test_many_layers_keep_legible_ticks_and_markup_stays_text():
    made = examples.input_probe(name="<b>x</b>")
    rows = ("embed", *map(str, range(47)))
    accuracy = {basis: value[:, :1].expand(2, 48) for basis, value in made.accuracy.items()}
    interval = {basis: value[:, :1].expand(2, 48, 2) for basis, value in made.accuracy_interval.items()}
    r2 = {basis: value[:, :1].expand(2, 48) for basis, value in made.r2.items()}
    elements = {basis: value[:, :1].expand(2, 48, -1) for basis, value in made.element_r2.items()}
    deep = dataclasses.replace(
        made, rows=rows, accuracy=accuracy, accuracy_interval=interval, r2=r2, element_r2=elements
    )
    figure = plot_input_probe(deep)
    assert len(figure.layout.xaxis.ticktext) <= 15
    assert figure.layout.xaxis.ticktext[0] == "embed"
    assert "<b>x" not in figure.layout.title.text
