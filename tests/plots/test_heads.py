"""Head figures show their results' numbers and escape foreign text."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import socket

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from mechlens.plots.circuitsvis import circuitsvis_bundle, script_json
from mechlens.plots.heads import (
    plot_attention,
    plot_attention_heatmap,
    plot_head_scores,
    plot_log_probs,
    plot_scores_against_nulls,
)
from mechlens.plots.style import DIVERGING, figure_text
from mechlens.text.color import SEQUENTIAL
from mechlens.text.display import number, visible_token
from tests import examples

MARKUP = "</script><b>&lt;$x$"


def trace(figure: go.Figure, name: str) -> go.Scatter:
    (found,) = [each for each in figure.data if each.name == name]
    return found


def test_log_probs_are_at_the_predicted_position():
    figure = plot_log_probs(examples.performance())
    mean = trace(figure, "mean")
    # 7 positions: the last predicts nothing, and nothing predicts the first.
    assert list(mean.x) == [1, 2, 3, 4, 5, 6]
    # -(pos + 1) for pos 0..5, minus the mean of 0, .1, .2, .3
    np.testing.assert_allclose(mean.y, [-1.15, -2.15, -3.15, -4.15, -5.15, -6.15], rtol=1e-6)


def test_the_band_contains_the_central_ninety_percent_of_sequences():
    band = trace(plot_log_probs(examples.performance()), "band")
    assert list(band.x) == [1, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1]
    # For -1, -1.1, -1.2, -1.3 the 5% and 95% quantiles are 0.15 steps from the ends.
    assert band.y[0] == pytest.approx(-1.015, rel=1e-6)
    assert band.y[-1] == pytest.approx(-1.285, rel=1e-6)


@pytest.mark.parametrize(("prepend_bos", "edges"), [(True, (0.5, 3.5, 6.5)), (False, (0.5, 2.5, 5.5))])
def test_the_copies_meet_between_two_positions(prepend_bos: bool, edges: tuple[float, ...]):
    figure = plot_log_probs(examples.performance(prepend_bos=prepend_bos))
    first, second, border = figure.layout.shapes
    assert (first.x0, first.x1, second.x1) == edges
    assert first.x1 == second.x0 == border.x0


def test_each_copy_is_labeled_with_its_means():
    first, second = (each.text for each in plot_log_probs(examples.performance()).layout.annotations)
    assert first == f"<b>first copy</b><br>mean {number(-9.5, 2)} nats<br>accuracy 0.00"
    assert second == f"<b>second copy</b><br>mean {number(-0.25, 2)} nats<br>accuracy 0.75"


def test_a_uniform_guess_is_over_the_vocabulary():
    assert set(trace(plot_log_probs(examples.performance()), "uniform guess").y) == {-math.log(64)}


@pytest.mark.parametrize(
    ("kind", "low", "colors"), [("induction_score", 0, SEQUENTIAL), ("copying_score", -1, DIVERGING)]
)
def test_colors_span_the_whole_range_of_a_score(kind, low, colors):
    figure = plot_head_scores(examples.head_scores(), kind)
    scores = trace(figure, kind)
    np.testing.assert_array_equal(scores.z, examples.head_scores().mean(kind))
    assert (scores.zmin, scores.zmax) == (low, 1)
    assert [color for _, color in scores.colorscale] == colors
    assert figure.layout.yaxis.autorange is None, "layer 0 must be at the bottom"


def test_the_hover_text_has_head_score_interval_and_null():
    scores = trace(plot_head_scores(examples.head_scores(), "induction_score"), "induction_score")
    assert scores.hoverinfo == "text"
    assert scores.hovertext[1][2] == (
        "<b>L1H2</b><br>induction score 0.875<br>95% interval 0.750 to 0.938<br>null 0.062"
    )
    copying = trace(plot_head_scores(examples.head_scores(), "copying_score"), "copying_score")
    assert copying.hovertext[0][1].endswith("<br>this score has no null")


def test_a_head_without_a_score_is_gray():
    figure = plot_head_scores(examples.head_scores(), "induction_score")
    absent = trace(figure, "no score")
    np.testing.assert_array_equal(np.isfinite(absent.z), examples.INDUCTION.isnan())
    assert absent.hovertext[1][1] == "<b>L1H1</b><br>no score"
    whole = plot_head_scores(examples.head_scores(), "copying_score")
    assert [each.name for each in whole.data] == ["copying_score"]


def test_only_the_strongest_heads_are_labeled():
    figure = plot_head_scores(examples.head_scores(), "copying_score", labeled=2)
    assert [list(row) for row in figure.data[0].text] == [["", "", ""], ["1.0", "", ".75"]]
    assert "highest: L1H0 1.00, L1H2 0.75" in figure.layout.title.text


def test_the_strongest_heads_are_drawn_with_their_nulls():
    figure = plot_scores_against_nulls(examples.head_scores(), "induction_score", top=2)
    null, score = figure.data
    assert list(score.y) == list(null.y) == ["L1H2", "L0H2"]
    assert list(score.x) == [0.875, 0.5]
    assert list(null.x) == [0.0625, 0.0625]
    # plotly takes distances from the score; the result has bounds
    assert list(score.error_x.array) == [0.0625, 0.0625]
    assert list(score.error_x.arrayminus) == [0.125, 0.125]
    assert figure.layout.yaxis.autorange == "reversed"


def test_heads_without_a_score_and_scores_without_a_null_are_not_drawn():
    scored = plot_scores_against_nulls(examples.head_scores(), "induction_score", top=10)
    assert len(scored.data[-1].y) == 5
    assert len(plot_scores_against_nulls(examples.head_scores(), "copying_score").data) == 1


def test_an_unknown_score_and_no_heads_are_errors():
    with pytest.raises(ValueError, match="kind must be one of induction_score, copying_score, got 'x'"):
        plot_head_scores(examples.head_scores(), "x")
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        plot_scores_against_nulls(examples.head_scores(), "induction_score", top=0)


def test_only_zero_attention_to_later_positions_is_hidden():
    patterns = examples.attention()
    (shown,) = plot_attention_heatmap(patterns, 0).data
    expected = torch.tensor([[1, math.nan, math.nan], [1 / 2, 1 / 2, math.nan], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(shown.z, expected, rtol=1e-6)
    patterns.patterns[0, 0, 2] = 0.25  # no causal model does this, so it must be visible
    assert plot_attention_heatmap(patterns, 0).data[0].z[0, 2] == 0.25


def test_both_axes_of_attention_are_labeled_with_tokens():
    figure = plot_attention_heatmap(examples.attention(), -1)
    assert list(figure.layout.xaxis.ticktext) == ["&lt;bos&gt;", "·a", "⏎"]
    assert figure.layout.xaxis.ticktext == figure.layout.yaxis.ticktext
    assert figure.layout.yaxis.autorange == "reversed"
    assert "L1H0" in figure.layout.title.text
    assert figure.data[0].hovertext[2][1] == "from <b>⏎</b> (2)<br>to <b>·a</b> (1)<br>attention 0.000"


def test_all_patterns_are_drawn_by_default_each_with_its_name():
    patterns = examples.attention()
    figure = plot_attention_heatmap(patterns)
    assert [trace.name for trace in figure.data] == ["L0H2", "L1H0"]
    for trace, pattern in zip(figure.data, patterns.patterns, strict=True):
        seen = torch.ones(3, 3).tril() > 0
        np.testing.assert_allclose(trace.z[seen], pattern[seen], rtol=1e-6)
    assert [note.text for note in figure.layout.annotations] == ["L0H2", "L1H0"]
    assert "Attention of L0H2, L1H0 (0 to 1)" in figure.layout.title.text
    assert "head" not in figure.layout.title.text
    assert figure.data[1].hovertext[2][1].startswith("<b>L1H0</b><br>from <b>⏎</b> (2)")
    assert [trace.showscale for trace in figure.data] == [True, False]


def test_a_selection_of_patterns_states_the_total():
    patterns = examples.attention()
    assert "one of 2 heads" in plot_attention_heatmap(patterns, 1).layout.title.text
    many = dataclasses.replace(
        patterns,
        heads=((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)),
        patterns=torch.eye(3).expand(5, 3, 3).clone(),
    )
    figure = plot_attention_heatmap(many)
    assert [trace.name for trace in figure.data] == ["L0H0", "L0H1", "L0H2", "L1H0"]
    assert "the first 4 of 5 heads; index= draws one" in figure.layout.title.text
    alone = dataclasses.replace(patterns, heads=((0, 2),), patterns=patterns.patterns[:1])
    assert "head" not in plot_attention_heatmap(alone).layout.title.text


def test_labels_of_many_tokens_are_thinned_but_stay_in_place():
    axis = plot_attention_heatmap(examples.attention(tokens=tuple(map(str, range(101))))).layout.xaxis
    assert len(axis.ticktext) <= 40
    assert list(axis.ticktext) == [str(at) for at in axis.tickvals]


def test_an_index_out_of_range_is_an_error():
    with pytest.raises(ValueError, match="index 2 is out of range: there are 2 patterns"):
        plot_attention_heatmap(examples.attention(), 2)


def test_the_view_has_the_patterns_and_their_heads():
    props = plot_attention(examples.attention()).props
    assert props["attentionHeadNames"] == ["L0H2", "L1H0"]
    assert props["tokens"] == ["<bos>", "·a", "⏎"]
    assert props["attention"][0] == [[1, 0, 0], [0.5, 0.5, 0], [0.333, 0.333, 0.333]]


def test_the_view_brings_its_script_and_opens_no_socket(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object):
        raise AssertionError("a display opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    view = plot_attention(examples.attention(tokens=(MARKUP, "a")))
    shown = view._repr_html_()
    assert shown.count("var CircuitsVis=") == 1
    assert "sourceMappingURL" not in shown
    assert len(re.findall("<script", shown.replace("<script><", ""))) == 1
    assert shown.count("</script") == 1
    assert shown.endswith("})();</script>")
    assert MARKUP not in shown
    place = re.match(r'<div id="([^"]+)"', shown)
    assert place is not None
    assert f'showView("{place[1]}", "AttentionHeads", ' in shown


def test_each_display_has_its_own_id():
    view = plot_attention(examples.attention())
    places = {re.search(r'id="([^"]+)"', view._repr_html_())[1] for _ in range(2)}  # type: ignore[index]
    assert len(places) == 2


def test_the_repr_of_a_view_is_short():
    assert repr(plot_attention(examples.attention())) == "View(component='AttentionHeads')"


def test_the_bundle_is_the_installed_one_and_cannot_close_its_script_tag():
    assert circuitsvis_bundle().startswith('"use strict";var CircuitsVis=')
    assert "AttentionHeads" in circuitsvis_bundle()
    assert "</script" not in circuitsvis_bundle().lower()
    assert "<!--" not in circuitsvis_bundle()


def test_script_json_has_the_same_content_without_tags():
    text = script_json({"token": MARKUP})
    assert "<" not in text
    assert json.loads(text) == {"token": MARKUP}


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "·the"),
        ("\n\r\t", "⏎␍⇥"),
        ("", "∅"),
        ("\x00\u200b\xa0\u202e", r"\x00\u200b\xa0\u202e"),
        ("\ud800", r"\ud800"),
        ("\ufffd", "\ufffd"),
        ("naïve", "naïve"),
        ("<|endoftext|>", "<|endoftext|>"),
    ],
)
def test_invisible_characters_of_a_token_are_made_visible(token: str, shown: str):
    assert visible_token(token) == shown


def test_long_tokens_are_cut_on_request():
    assert visible_token("-" * 64, longest=4) == "----…"
    assert visible_token("----", longest=4) == "----"


def test_markup_in_tokens_and_names_is_escaped():
    assert figure_text(MARKUP) == "&lt;/script&gt;&lt;b&gt;&amp;lt;&#36;x&#36;"
    figures = [
        plot_log_probs(examples.performance(MARKUP)),
        plot_head_scores(examples.head_scores(MARKUP), "induction_score"),
        plot_scores_against_nulls(examples.head_scores(MARKUP), "induction_score"),
        plot_attention_heatmap(examples.attention(MARKUP, tokens=(MARKUP, "a"))),
    ]
    for figure in figures:
        text = json.dumps(figure.to_plotly_json(), default=str)
        assert figure_text(MARKUP) in text
        assert MARKUP not in text


def test_numbers_have_a_minus_sign_and_nan_reads_not_measured():
    assert number(math.nan) == "not measured"
    assert number(-0.5, 1) == "−0.5"  # noqa: RUF001
