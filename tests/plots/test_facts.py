"""The figure of facts by layer."""

from __future__ import annotations

import pytest

from mechlens.plots.facts import plot_facts
from tests import examples


def test_lines_show_the_shares_and_the_mean_probability_of_each_row():
    figure = plot_facts(examples.facts())
    lines = {trace.name: list(trace.y) for trace in figure.data}
    assert list(figure.data[0].x) == ["emb.", "0", "1"]
    assert lines["top-1"] == [0.0, 0.0, 0.5]
    assert lines["top 10"] == [0.0, 0.5, 1.0]
    assert lines["wrong answer, top-1"] == [0.0, 0.0, 0.5]
    assert lines["mean probability"][-1] == pytest.approx((1 + 1 / 7) / 2 * 2.718281828**-0.5)
    assert "with BOS" in figure.layout.title.text


def test_another_result_is_refused():
    with pytest.raises(TypeError, match="Facts"):
        plot_facts(examples.lens())
