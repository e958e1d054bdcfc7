"""The tuned-lens figure shows its numbers."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from mechlens.plots.tuned_lens import plot_tuned_lens
from tests.examples import model, tuned_lens


def lens():
    return dataclasses.replace(
        tuned_lens(),
        model=dataclasses.replace(model(), name="<b>tiny</b> $x$"),
        kl_plain=torch.tensor([4.0, 2.0, 1e-7]),
        kl_tuned=torch.tensor([1.0, 0.5, 1e-7]),
        held_out_tokens=12345,
        steps=250,
    )


def test_both_lines_are_drawn_without_the_last_layer() -> None:
    figure = plot_tuned_lens(lens())
    assert {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data} == {
        "plain": (["embed", "0"], [4.0, 2.0]),
        "tuned": (["embed", "0"], [1.0, 0.5]),
    }
    assert figure.data[1].hovertext[1] == "row 0, tuned: 0.500 nats"
    title = figure.layout.title.text
    assert "&lt;b&gt;tiny&lt;/b&gt; &#36;x&#36;" in title
    assert "12,345 tokens; 250 steps" in title


def test_the_title_has_room_next_to_the_buttons() -> None:
    figure = plot_tuned_lens(lens())
    assert figure.layout.template.layout.modebar.orientation == "v"
    title = re.search("<b>(.*?)</b>", figure.layout.title.text)[1]  # type: ignore[index]
    # bold 15-pixel letters are at most 9 wide on average, the buttons 30
    assert figure.layout.width >= 9 * len(title) + 30


def test_lines_are_distinguishable_without_color() -> None:
    plain, tuned = plot_tuned_lens(lens()).data
    assert plain.line.dash != tuned.line.dash
    assert plain.marker.symbol != tuned.marker.symbol


def test_a_kl_of_zero_is_left_out_of_a_logarithmic_axis() -> None:
    figure = plot_tuned_lens(dataclasses.replace(lens(), kl_tuned=torch.tensor([1.0, 0.0, 0.0])))
    assert figure.layout.yaxis.type == "log"
    assert list(figure.data[1].y) == [1.0, None]


def test_a_lens_without_a_measured_kl_is_refused() -> None:
    unmeasured = dataclasses.replace(tuned_lens(), kl_tuned=torch.full((3,), torch.nan))
    with pytest.raises(ValueError, match="'a checkpoint', has no held-out KL to draw"):
        plot_tuned_lens(unmeasured)
