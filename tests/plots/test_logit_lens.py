"""Lens figures on a result with known values."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import plotly.graph_objects as go
import pytest
import torch

from mechlens.plots.lens_lines import MAX_LINES, plot_lens_lines
from mechlens.plots.logit_lens import plot_logit_lens
from mechlens.plots.style import WIDTH
from mechlens.results import LogitLensResult
from mechlens.results.lens import interleaved
from mechlens.results.lens_statistics import NAMES
from mechlens.text.color import SEQUENTIAL, is_dark, sequential
from tests.examples import lens, sublayer_lens


def cells(figure: go.Figure) -> list[list[str]]:
    """The text of the cells, without marks."""
    return [[re.sub("</?(b|span)[^>]*>", "", text) for text in line] for line in figure.data[0].text]


def heatmaps(figure: go.Figure) -> list[go.Heatmap]:
    return [trace for trace in figure.data if isinstance(trace, go.Heatmap)]


def test_cells_have_guesses_and_a_star_if_right():
    figure = plot_logit_lens(lens(), "kl_final")
    heat = figure.data[0]
    assert heat.z.tolist() == [[8.0, 4.0, 2.0], [0.0, 0.5, 0.25]]
    assert list(figure.layout.yaxis.ticktext) == ["embed", "0"]
    assert cells(figure) == [["b", "b", "b"], ["·a", "&lt;b&gt;x&lt;/b&gt;·y…", "·a"]]
    assert list(figure.layout.xaxis.ticktext) == ["&lt;s&gt;", "·a", "b"]
    # ` a` follows <s>, as predicted; b follows ` a`, which is not predicted
    assert list(figure.layout.xaxis2.ticktext) == ["·a*", "b", ""]
    assert heat.hovertext[1][0].split("<br>") == [
        "after <b>&lt;s&gt;</b>, position 0",
        "row 0: KL(final || layer), nats 0.000",
        "0.750 ·a",
        "0.125 b",
    ]


def test_correct_guesses_are_bold_in_every_row():
    texts = plot_logit_lens(lens(), "kl_final").data[0].text
    assert ["<b>" in text for text in texts[0]] == [False, True, False]
    assert ["<b>" in text for text in texts[1]] == [True, False, False]


def test_text_is_light_only_on_dark_cells():
    texts = plot_logit_lens(lens(), "kl_final").data[0].text
    assert ["#fff" in text for text in texts[0]] == [True, False, False]
    assert "#fff" not in "".join(texts[1])
    # by WCAG's contrast ratio, dark text is better on the middle of the scale, white on the next color
    assert [is_dark(sequential(share)) for share in (0, 0.2, 0.4, 0.6, 0.8, 1)] == [False] * 4 + [True] * 2
    assert ["#{:02x}{:02x}{:02x}".format(*sequential(at / 5)) for at in range(6)] == SEQUENTIAL


def test_ranks_are_colored_by_their_logarithm():
    figure = plot_logit_lens(lens(), "rank_final")
    assert figure.data[0].z.tolist() == [[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert figure.data[0].colorbar.ticktext == ("1", "10", "100")
    assert "final guess 100<br>" in figure.data[0].hovertext[0][0]


@pytest.mark.parametrize(
    ("stat", "values", "title"),
    [
        ("probability", [[0.5, 0.5, 0.5], [0.75, 0.75, 0.75]], "probability of the top guess"),
        ("entropy", [[8.0, 4.0, 2.0], [0.0, 0.5, 0.25]], "entropy, nats"),
        ("rank_input", [[9.0, 5.0, 3.0], [1.0, 1.5, 1.25]], "rank of the input token"),
        ("rank_ a", [[7.0, 7.0, 7.0], [2.0, 2.0, 2.0]], "rank of ·a"),
        ("probability_·a", [[0.25, 0.25, 0.25], [1.0, 1.0, 1.0]], "probability of ·a"),
    ],
)
def test_the_color_is_the_statistic_named_by_its_column(stat, values, title):
    heat = plot_logit_lens(lens(), stat).data[0]
    shown = torch.tensor(heat.z)
    shown = 10**shown if "rank" in stat else shown
    # rounding in float32 and in the logarithm and its inverse
    torch.testing.assert_close(shown, torch.tensor(values).double(), atol=1e-6, rtol=1e-6)
    assert heat.colorbar.title.text == title
    least = 1.0 if stat.startswith(("probability", "rank")) else 0.0  # a rank of 10
    assert heat.zmax == pytest.approx(max(least, *map(max, heat.z)))


def test_an_undefined_cell_is_gray_and_keeps_its_guess():
    figure = plot_logit_lens(lens(), "rank_next")
    values, gray = heatmaps(figure)
    assert torch.tensor(values.z).isnan().tolist() == torch.tensor([[False, False, True]] * 2).tolist()
    assert torch.tensor(gray.z).isnan().tolist() == torch.tensor([[True, True, False]] * 2).tolist()
    assert list(gray.text[0]) == ["", "", "b"]
    assert "follows undefined<br>" in gray.hovertext[1][2]
    assert len(heatmaps(plot_logit_lens(lens(), "kl_final"))) == 1


def test_the_color_bar_marks_values_beyond_high():
    figure = plot_logit_lens(lens(), "kl_final", high=4)
    assert figure.data[0].zmax == 4
    assert figure.data[0].z.max() == 8
    assert figure.data[0].colorbar.ticktext[-1] == "≥ 4"
    ranks = plot_logit_lens(lens(), "rank_final", high=50).data[0]
    assert ranks.zmax == pytest.approx(math.log10(50))
    assert ranks.colorbar.ticktext == ("1", "10", "≥ 50")
    # nothing is beyond
    assert plot_logit_lens(lens(), "rank_final", high=1000).data[0].colorbar.ticktext[-1] == "1,000"
    for stat, high in (
        ("rank_final", 1),
        ("kl_final", 0),
        ("kl_final", -3),
        ("kl_final", math.nan),
        ("kl_final", math.inf),
    ):
        with pytest.raises(ValueError, match=r"high must be a finite number above [01], got"):
            plot_logit_lens(lens(), stat, high=high)


def test_padding_is_left_out():
    padded = dataclasses.replace(
        lens(),
        tokens=torch.tensor([[0, 0, 1, 2, 0]]),
        mask=torch.tensor([[False, True, True, True, False]]),
        positions=(1, 2, 3),
    )
    figure = plot_logit_lens(padded)
    assert list(figure.layout.xaxis.ticktext) == ["&lt;s&gt;", "·a", "b"]
    assert list(figure.layout.xaxis2.ticktext) == ["·a*", "b", ""], "padding does not follow"
    # the same if padding was read, too
    grid = {
        name: torch.nn.functional.pad(getattr(padded, name), (1, 1), value=math.nan)
        for name in ("entropy", "kl_final", "kl_input")
    }
    whole = dataclasses.replace(
        padded,
        **grid,
        positions=(0, 1, 2, 3, 4),
        context_length=torch.tensor([[0, 1, 2, 3, 0]]),
        top_ids=torch.nn.functional.pad(padded.top_ids, (0, 0, 1, 1)),
        top_probabilities=torch.nn.functional.pad(padded.top_probabilities, (0, 0, 1, 1), value=math.nan),
        final_ids=torch.nn.functional.pad(padded.final_ids, (1, 1)),
        log_prob={},
        rank={},
        target_ids={},
    )
    assert plot_logit_lens(whole).to_dict() == figure.to_dict()
    with pytest.raises(ValueError, match="position 4 of sequence 0 is padding"):
        plot_logit_lens(whole, positions=[4])
    with pytest.raises(ValueError, match="has only padding at the positions"):
        plot_logit_lens(dataclasses.replace(whole, mask=torch.zeros(1, 5, dtype=torch.bool)))


def test_positions_are_chosen_by_index():
    figure = plot_logit_lens(lens(), positions=[-1, 0])
    assert list(figure.layout.xaxis.ticktext) == ["b", "&lt;s&gt;"]
    assert figure.data[0].z.tolist() == [[2.0, 8.0], [0.25, 0.0]]
    some = dataclasses.replace(plot_input(40), positions=tuple(range(40)))
    assert plot_logit_lens(some, positions=range(3)).layout.width < plot_logit_lens(some).layout.width
    for positions in ([3], [-4]):
        with pytest.raises(ValueError, match="was not read"):
            plot_logit_lens(lens(), positions=positions)
    with pytest.raises(ValueError, match="no position selected"):
        plot_logit_lens(lens(), positions=[])


def plot_input(n_pos: int, n_rows: int = 2, token: str = " somewhat long") -> LogitLensResult:
    """A lens of any size with equal text in all cells."""
    values = torch.ones(n_rows, 1, n_pos)
    ones = torch.ones(n_rows, 1, n_pos, 1)
    return dataclasses.replace(
        lens(),
        tokens=torch.ones(1, n_pos, dtype=torch.long),
        mask=torch.ones(1, n_pos, dtype=torch.bool),
        positions=tuple(range(n_pos)),
        context_length=torch.arange(1, n_pos + 1)[None],
        rows=("embed", *map(str, range(n_rows - 1))),
        top_ids=ones.long(),
        top_probabilities=ones,
        entropy=values,
        kl_final=values,
        kl_input=values,
        final_ids=torch.ones(1, n_pos, dtype=torch.long),
        log_prob={},
        rank={"final": values},
        target_ids={},
        strings={"1": token},
    )


@pytest.mark.parametrize(("n_pos", "n_rows"), [(1, 2), (8, 13), (40, 13), (40, 49), (5, 145)])
def test_every_cell_has_room_for_its_text(n_pos, n_rows):
    found = plot_input(n_pos, n_rows)
    figure = plot_logit_lens(found, positions=found.positions)
    size = figure.data[0].textfont.size
    width = (figure.layout.width - 168) / n_pos
    height = (figure.layout.height - 200) / n_rows
    longest = max(len(text) for line in cells(figure) for text in line)
    assert size >= (11 if n_rows < 100 else 9)
    # sans serif letters are about half as wide as high
    assert width >= 0.5 * size * longest
    assert height >= 1.4 * size
    # long tokens are shortened where there are many in a row
    assert longest >= 7
    assert width <= (60 if n_pos == 40 else 400)
    assert len(figure.layout.yaxis.ticktext) == n_rows


def test_a_long_text_is_drawn_as_the_last_positions_that_fit():
    found = plot_input(65)
    figure = plot_logit_lens(found)
    n_drawn = len(figure.data[0].x)
    # six letters of each token and an ellipsis, at about 55 pixels
    assert 15 <= n_drawn <= 20
    assert figure.layout.width <= WIDTH
    assert f"the last {n_drawn} of 65 positions; positions= chooses others" in figure.layout.title.text
    assert f"position {65 - n_drawn}<" in figure.data[0].hovertext[0][0]
    assert "position 64<" in figure.data[0].hovertext[0][-1]
    assert len(plot_logit_lens(found, positions=found.positions).data[0].x) == 65
    short = plot_logit_lens(plot_input(20, token="a"))
    assert len(short.data[0].x) == 20, "short tokens leave room for more"
    assert "positions" not in short.layout.title.text


def test_the_title_names_the_statistic():
    for stat, title in (
        ("kl_final", "KL(final || layer)"),
        ("entropy", "entropy"),
        ("rank_final", "rank of the model's"),
    ):
        assert plot_logit_lens(lens(), stat).layout.title.text.startswith(f"<b>Logit lens: {title}")
    figure = plot_logit_lens(lens(), "rank_ a")
    assert figure.layout.title.text.startswith("<b>Logit lens: rank of ·a</b>")


def test_whitespace_and_control_characters_are_visible():
    for token, shown in (("\n\n", "⏎⏎"), (" ", "·"), ("\t", "⇥"), ("\u200b", "\\u200b"), ("", "∅")):
        figure = plot_logit_lens(plot_input(2, token=token))
        assert cells(figure)[0] == [shown] * 2
        assert figure.layout.xaxis.ticktext[0] == shown
        assert f"<b>{shown}</b>" in figure.data[0].hovertext[0][0]


def test_a_position_read_in_a_window_states_its_context():
    windowed = dataclasses.replace(lens(), context_length=torch.tensor([[1, 2, 2]]))
    hovers = plot_logit_lens(windowed).data[0].hovertext[0]
    assert ["tokens seen" in hover for hover in hovers] == [False, False, True]
    assert "position 2 (2 tokens seen)" in hovers[2]


def test_the_title_states_what_was_read_and_how():
    changed = dataclasses.replace(lens(), read="resid_pre+attn_out", decoder="LastBlocks(2)")
    title = plot_logit_lens(changed).layout.title.text
    assert "tiny · resid_pre+attn_out · decoder LastBlocks(2)" in title
    assert "decoder" not in plot_logit_lens(lens()).layout.title.text
    heads = dataclasses.replace(lens(), read="result", rows=("embed", "L0H3"))
    assert plot_logit_lens(heads).layout.yaxis.title.text == "head"
    for figure in (plot_logit_lens(heads), plot_lens_lines(heads)):
        assert "embed: the stream at its start, not a head" in figure.layout.title.text
    assert "at its start" not in plot_lens_lines(lens()).layout.title.text


def test_markup_in_a_token_stays_text():
    for stat in (*NAMES, "rank_final", "rank_ a"):
        tied = dataclasses.replace(lens(), kl_input=torch.ones(2, 1, 3))
        assert "<b>x" not in str(plot_logit_lens(tied, stat).to_dict())
        assert "<b>x" not in str(plot_lens_lines(plot_input(2, token="<b>x"), "kl_final").to_dict())


def test_the_error_for_an_unknown_statistic_lists_all():
    known = (
        "probability, entropy, kl_final, kl_input, rank_final, rank_input, rank_next, rank_·a, probability_f"
    )
    with pytest.raises(ValueError, match=f"stat must be one of {known}.*, got 'color': targets add"):
        plot_logit_lens(lens(), "color")
    with pytest.raises(ValueError, match="got 'rank_b'"):
        plot_lens_lines(lens(), "rank_b")


def test_a_statistic_that_was_not_computed_is_refused():
    with pytest.raises(
        ValueError, match="made without rank, which rank_next needs: add 'rank' to statistics"
    ):
        plot_logit_lens(dataclasses.replace(lens(), statistics=("entropy",)), "rank_next")


def test_kl_from_the_input_needs_a_tied_unembedding():
    with pytest.raises(ValueError, match=r"is not tied to its embedding.*use rank_input"):
        plot_logit_lens(lens(), "kl_input")
    tied = dataclasses.replace(lens(), kl_input=torch.ones(2, 1, 3))
    assert plot_logit_lens(tied, "kl_input").data[0].z.max() == 1


def test_a_sequence_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="row must be between 0 and 0, got 1"):
        plot_logit_lens(lens(), row=1)


# -- sublayers -------------------------------------------------------------------------------------


def test_interleaved_lenses_have_a_row_for_each_sublayer():
    attn, mlp = sublayer_lens("attn_out", 0.0), sublayer_lens("mlp_out", 0.5)
    both = interleaved(attn, mlp)
    figure = plot_logit_lens(both)
    assert list(figure.layout.yaxis.ticktext) == ["embed", "0 attn", "0 MLP", "1 attn", "1 MLP"]
    # kl_final of row r is r plus the component's `more`; the row embed is that of the first
    assert figure.data[0].z[:, 0].tolist() == [0.0, 1.0, 1.5, 2.0, 2.5]
    ranks = 10 ** plot_logit_lens(both, "rank_final").data[0].z
    # float64 rounding in the logarithm
    assert ranks[:, 0].tolist() == pytest.approx([10, 20, 25, 30, 35], rel=1e-12)
    assert cells(figure)[1:3] == [["·a", "·a"], ["b", "b"]]
    assert figure.layout.title.text.startswith("<b>Logit lens by sublayer: KL(final || layer)<")
    assert figure.layout.yaxis.title.text == "sublayer"
    assert both.to_dataframe().query("row == '1 MLP'")["layer"].tolist() == [1, 1]
    streams = interleaved(sublayer_lens("resid_mid", 0.0), sublayer_lens("resid_post", 0.5))
    assert torch.equal(streams.kl_final, both.kl_final)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", torch.tensor([[1, 1]])),
        ("rows", ("embed", "0", "2")),
        ("decoder", "tuned_lens"),
        ("model", dataclasses.replace(lens().model, name="other")),
        ("mask", torch.tensor([[False, True]])),
    ],
)
def test_lenses_of_different_runs_are_not_interleaved(name, value):
    attn, mlp = sublayer_lens("attn_out", 0.0), sublayer_lens("mlp_out", 0.5)
    with pytest.raises(ValueError, match=f"the two lenses differ in {name}: make them with the same"):
        interleaved(attn, dataclasses.replace(mlp, **{name: value}))


def test_only_attention_and_mlp_are_interleaved_in_this_order():
    attn, mlp = sublayer_lens("attn_out", 0.0), sublayer_lens("mlp_out", 0.5)
    for first, second in ((mlp, attn), (attn, attn), (attn, sublayer_lens("resid_post", 0.0))):
        with pytest.raises(ValueError, match=f"got {first.read} and {second.read}"):
            interleaved(first, second)


# -- lines -----------------------------------------------------------------------------------------


def test_lines_have_the_values_of_their_position():
    figure = plot_lens_lines(lens(), positions=[0, 2])
    named = [(trace.name, trace.yaxis, trace.y) for trace in figure.data]
    assert named == [
        ("0 &lt;s&gt;", "y", (100.0, 1.0)),
        ("0 &lt;s&gt;", "y2", (8.0, 0.0)),
        ("2 b", "y", (1.0, 1.0)),
        ("2 b", "y2", (2.0, 0.25)),
    ]
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis2.type is None
    assert list(figure.layout.xaxis2.ticktext) == ["embed", "0"]
    assert [trace.showlegend for trace in figure.data] == [True, False, True, False]
    assert figure.layout.title.text.startswith(
        "<b>Rank of the model's final guess and KL(final || layer) by layer</b>"
    )


def test_many_statistics_have_a_short_title_and_their_own_labels():
    stats = ("rank_final", "kl_final", "entropy", "probability")
    figure = plot_lens_lines(plot_input(40), stats)
    assert figure.layout.title.text.startswith("<b>Logit lens by layer</b>")
    axes = [figure.layout[f"xaxis{at or ''}"] for at in ("", 2, 3, 4)]
    assert [axis.showticklabels for axis in axes] == [True] * 4
    assert [axis.title.text for axis in axes] == ["layer"] * 4
    # a panel is as high as one of two side by side, with room for the labels below
    panels = [figure.layout[f"yaxis{at}"].domain for at in ("", 2, 3, 4)]
    height = figure.layout.height - 132
    assert min(high - low for low, high in panels) * height > 180
    gaps = [above[0] - below[1] for above, below in itertools.pairwise(panels)]
    assert min(gaps) * height > 60
    two = plot_lens_lines(lens())
    assert [two.layout.xaxis.title.text, two.layout.xaxis2.title.text] == [None, "layer"]


def test_lines_differ_without_color():
    figure = plot_lens_lines(plot_input(40), "kl_final", positions=range(MAX_LINES))
    symbols = [trace.marker.symbol for trace in figure.data]
    assert len(set(symbols)) == len(symbols) == MAX_LINES
    dashes = {(trace.line.color, trace.line.dash) for trace in figure.data}
    assert len(dashes) == MAX_LINES
    with pytest.raises(ValueError, match="at most 12 lines can be distinguished, got 13"):
        plot_lens_lines(plot_input(40), "kl_final", positions=range(13))


def test_lines_of_a_long_text_show_its_end():
    names = [trace.name.split()[0] for trace in plot_lens_lines(plot_input(40), "kl_final").data]
    assert names == ["34", "35", "36", "37", "38", "39"]


def test_undefined_values_are_gaps():
    figure = plot_lens_lines(lens(), "rank_next")
    assert figure.data[2].y == (None, None)
    assert "undefined" in figure.data[2].text[0]


def test_lines_need_a_statistic():
    with pytest.raises(ValueError, match="stats must be at least one of probability, entropy"):
        plot_lens_lines(lens(), [])


def test_labels_of_many_layers_do_not_overlap():
    ticks = plot_lens_lines(plot_input(2, 49), "kl_final").layout.xaxis
    assert ticks.ticktext[:4] == ("embed", "2", "4", "6")
    assert ticks.tickvals[:4] == (0, 3, 5, 7)


def test_a_star_is_no_wider_than_an_ellipsis():
    for token, shown in ((" after", "·after*"), (" afternoon", "·afte…*")):
        right = plot_logit_lens(plot_input(40, token=token), positions=range(40)).layout.xaxis2.ticktext
        assert right == (shown,) * 39 + ("",)
