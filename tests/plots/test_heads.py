"""Figures hold the results' numbers, and texts of others stay texts."""

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
from tests import hand_made

MARKUP = "</script><b>&lt;$x$"


def trace(figure: go.Figure, name: str) -> go.Scatter:
    (found,) = [each for each in figure.data if each.name == name]
    return found


def test_log_probs_stand_at_the_predicted_position() -> None:
    figure = plot_log_probs(hand_made.performance())
    mean = trace(figure, "mean")
    # 7 positions: the last predicts nothing, the first is predicted by none.
    assert list(mean.x) == [1, 2, 3, 4, 5, 6]
    # -(pos + 1) for pos 0..5, less the mean of 0, .1, .2, .3
    np.testing.assert_allclose(mean.y, [-1.15, -2.15, -3.15, -4.15, -5.15, -6.15], rtol=1e-6)


def test_band_holds_the_central_ninety_percent_of_sequences() -> None:
    band = trace(plot_log_probs(hand_made.performance()), "band")
    assert list(band.x) == [1, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1]
    # Over -1, -1.1, -1.2, -1.3 the 5% and 95% quantiles lie 0.15 steps from the ends.
    assert band.y[0] == pytest.approx(-1.015, rel=1e-6)
    assert band.y[-1] == pytest.approx(-1.285, rel=1e-6)


@pytest.mark.parametrize(("prepend_bos", "edges"), [(True, (0.5, 3.5, 6.5)), (False, (0.5, 2.5, 5.5))])
def test_copies_meet_between_the_positions(prepend_bos: bool, edges: tuple[float, ...]) -> None:
    figure = plot_log_probs(hand_made.performance(prepend_bos=prepend_bos))
    first, second, border = figure.layout.shapes
    assert (first.x0, first.x1, second.x1) == edges
    assert first.x1 == second.x0 == border.x0


def test_copies_are_labelled_with_their_means() -> None:
    texts = [each.text for each in plot_log_probs(hand_made.performance()).layout.annotations]
    assert "first copy" in texts[0]
    assert "mean −9.50 nats" in texts[0]  # noqa: RUF001  # the minus sign is meant
    assert "accuracy 0.00" in texts[0]
    assert "second copy" in texts[1]
    assert "mean −0.25 nats" in texts[1]  # noqa: RUF001
    assert "accuracy 0.75" in texts[1]


def test_uniform_guess_is_over_the_vocabulary() -> None:
    assert set(trace(plot_log_probs(hand_made.performance()), "uniform guess").y) == {-math.log(64)}


def test_heatmap_holds_the_scores_on_the_whole_range() -> None:
    scores = trace(plot_head_scores(hand_made.head_scores(), "induction_score"), "induction_score")
    np.testing.assert_array_equal(scores.z, hand_made.INDUCTION)
    assert (scores.zmin, scores.zmax) == (0, 1)
    assert [colour for _, colour in scores.colorscale] == SEQUENTIAL


def test_copying_score_is_drawn_around_zero() -> None:
    scores = trace(plot_head_scores(hand_made.head_scores(), "copying_score"), "copying_score")
    assert (scores.zmin, scores.zmax) == (-1, 1)
    assert [colour for _, colour in scores.colorscale] == DIVERGING
    assert scores.colorscale[len(DIVERGING) // 2][0] == 0.5


def test_hover_names_the_head_with_score_interval_and_null() -> None:
    scores = trace(plot_head_scores(hand_made.head_scores(), "induction_score"), "induction_score")
    assert scores.hoverinfo == "text"
    assert scores.hovertext[1][2] == (
        "<b>L1H2</b><br>induction score 0.875<br>95% interval 0.750 to 0.938<br>null 0.062"
    )
    copying = trace(plot_head_scores(hand_made.head_scores(), "copying_score"), "copying_score")
    assert copying.hovertext[0][1].endswith("<br>no null for this kind")


def test_head_without_a_score_is_absent_not_zero() -> None:
    figure = plot_head_scores(hand_made.head_scores(), "induction_score")
    absent = trace(figure, "no score")
    np.testing.assert_array_equal(np.isfinite(absent.z), hand_made.INDUCTION.isnan())
    assert absent.hovertext[1][1] == "<b>L1H1</b><br>no score"
    whole = plot_head_scores(hand_made.head_scores(), "copying_score")
    assert [each.name for each in whole.data] == ["copying_score"]


def test_only_the_strongest_heads_are_written_into_cells() -> None:
    figure = plot_head_scores(hand_made.head_scores(), "copying_score", labelled=2)
    assert [list(row) for row in figure.data[0].text] == [["", "", ""], ["1.0", "", ".75"]]
    assert "highest: L1H0 1.00, L1H2 0.75" in figure.layout.title.text


def test_layers_go_upwards() -> None:
    assert plot_head_scores(hand_made.head_scores(), "copying_score").layout.yaxis.autorange is None


def test_top_heads_stand_beside_their_nulls() -> None:
    figure = plot_scores_against_nulls(hand_made.head_scores(), "induction_score", top=2)
    null, score = figure.data
    assert list(score.y) == list(null.y) == ["L1H2", "L0H2"]
    assert list(score.x) == [0.875, 0.5]
    assert list(null.x) == [0.0625, 0.0625]
    # plotly wants distances from the score, the result has bounds
    assert list(score.error_x.array) == [0.0625, 0.0625]
    assert list(score.error_x.arrayminus) == [0.125, 0.125]
    assert figure.layout.yaxis.autorange == "reversed"


def test_all_heads_with_a_score_are_shown_where_there_are_few() -> None:
    figure = plot_scores_against_nulls(hand_made.head_scores(), "induction_score", top=10)
    assert len(figure.data[-1].y) == 5


def test_kind_without_null_says_so() -> None:
    figure = plot_scores_against_nulls(hand_made.head_scores(), "copying_score")
    assert len(figure.data) == 1
    assert "no null" in figure.layout.title.text


def test_unknown_kind_and_no_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of induction_score, copying_score, got 'x'"):
        plot_head_scores(hand_made.head_scores(), "x")
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        plot_scores_against_nulls(hand_made.head_scores(), "induction_score", top=0)


def test_attention_heatmap_hides_only_what_cannot_be_seen() -> None:
    patterns = hand_made.attention()
    (shown,) = plot_attention_heatmap(patterns, 0).data
    expected = torch.tensor([[1, math.nan, math.nan], [1 / 2, 1 / 2, math.nan], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(shown.z, expected, rtol=1e-6)
    patterns.patterns[0, 0, 2] = 0.25  # no causal model does this, so nobody may be kept from seeing it
    assert plot_attention_heatmap(patterns, 0).data[0].z[0, 2] == 0.25


def test_attention_heatmap_has_tokens_on_both_axes() -> None:
    figure = plot_attention_heatmap(hand_made.attention(), -1)
    assert list(figure.layout.xaxis.ticktext) == ["&lt;bos&gt;", "·a", "⏎"]
    assert figure.layout.xaxis.ticktext == figure.layout.yaxis.ticktext
    assert figure.layout.yaxis.autorange == "reversed"
    assert "L1H0" in figure.layout.title.text
    assert figure.data[0].hovertext[2][1] == "from <b>⏎</b> (2)<br>to <b>·a</b> (1)<br>attention 0.000"


def test_attention_of_all_heads_is_drawn_unasked_each_by_its_name() -> None:
    patterns = hand_made.attention()
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


def test_attention_of_some_heads_says_how_many_there_are() -> None:
    patterns = hand_made.attention()
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


def test_attention_heatmap_thins_out_many_labels_at_their_places() -> None:
    axis = plot_attention_heatmap(hand_made.attention(tokens=tuple(map(str, range(101))))).layout.xaxis
    assert len(axis.ticktext) <= 40
    assert list(axis.ticktext) == [str(at) for at in axis.tickvals]


def test_attention_of_a_missing_head_is_refused() -> None:
    with pytest.raises(ValueError, match="index must be below 2, the number of heads here, but is 2"):
        plot_attention_heatmap(hand_made.attention(), 2)


def test_attention_view_has_the_patterns_by_name() -> None:
    props = plot_attention(hand_made.attention()).props
    assert props["attentionHeadNames"] == ["L0H2", "L1H0"]
    assert props["tokens"] == ["<bos>", "·a", "⏎"]
    assert props["attention"][0] == [[1, 0, 0], [0.5, 0.5, 0], [0.333, 0.333, 0.333]]


def test_attention_view_asks_no_network_and_brings_its_script(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a display opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    view = plot_attention(hand_made.attention(tokens=(MARKUP, "a")))
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


def test_each_display_has_a_place_of_its_own() -> None:
    view = plot_attention(hand_made.attention())
    places = {re.search(r'id="([^"]+)"', view._repr_html_())[1] for _ in range(2)}  # type: ignore[index]
    assert len(places) == 2


def test_view_is_short_where_it_is_text() -> None:
    assert repr(plot_attention(hand_made.attention())) == "View(component='AttentionHeads')"


def test_bundle_is_the_installed_one_and_cannot_end_its_script() -> None:
    assert circuitsvis_bundle().startswith('"use strict";var CircuitsVis=')
    assert "AttentionHeads" in circuitsvis_bundle()
    assert "</script" not in circuitsvis_bundle().lower()
    assert "<!--" not in circuitsvis_bundle()


def test_script_json_says_the_same_without_a_tag() -> None:
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
def test_tokens_are_visible(token: str, shown: str) -> None:
    assert visible_token(token) == shown


def test_long_tokens_are_shortened_where_asked() -> None:
    assert visible_token("-" * 64, longest=4) == "----…"
    assert visible_token("----", longest=4) == "----"


def test_figure_texts_are_read_as_texts() -> None:
    assert figure_text(MARKUP) == "&lt;/script&gt;&lt;b&gt;&amp;lt;&#36;x&#36;"
    figures = [
        plot_log_probs(hand_made.performance(MARKUP)),
        plot_head_scores(hand_made.head_scores(MARKUP), "induction_score"),
        plot_scores_against_nulls(hand_made.head_scores(MARKUP), "induction_score"),
        plot_attention_heatmap(hand_made.attention(MARKUP, tokens=(MARKUP, "a"))),
    ]
    for figure in figures:
        text = json.dumps(figure.to_plotly_json(), default=str)
        assert figure_text(MARKUP) in text
        assert MARKUP not in text


def test_nan_is_said() -> None:
    assert number(math.nan) == "not measured"
    assert number(-0.5, 1) == "−0.5"  # noqa: RUF001
