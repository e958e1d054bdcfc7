"""The section on a lens, and its grid in terminals of common widths."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from rich.cells import cell_len

import mechlens
from mechlens.results import LogitLensResult
from mechlens.show.lens import MAX_POSITIONS, lens_section
from mechlens.show.section import Figure
from mechlens.show.terminal import print_section
from tests.examples import deep_lens, lens, sublayer_lens


def sized(n_pos: int, n_rows: int, *, token: str = " word") -> LogitLensResult:
    """A lens with guess `r.p`, KL r and entropy p in row r at position p."""
    kl = torch.arange(float(n_rows))[:, None, None].expand(n_rows, 1, n_pos)
    guesses = 1 + torch.arange(n_rows * n_pos).view(n_rows, 1, n_pos, 1)
    strings = {str(1 + row * n_pos + at): f"{row}.{at}" for row in range(n_rows) for at in range(n_pos)}
    return dataclasses.replace(
        lens(),
        tokens=torch.zeros(1, n_pos, dtype=torch.long),
        mask=torch.ones(1, n_pos, dtype=torch.bool),
        positions=tuple(range(n_pos)),
        context_length=torch.arange(1, n_pos + 1)[None],
        rows=("embed", *map(str, range(n_rows - 1))),
        top_ids=guesses,
        top_probabilities=torch.ones(n_rows, 1, n_pos, 1),
        entropy=torch.arange(float(n_pos)).expand(n_rows, 1, n_pos),
        kl_final=kl,
        kl_input=kl,
        final_ids=guesses[-1, ..., 0],
        log_prob={},
        rank={"final": kl + 1},
        target_ids={},
        strings={"0": token, **strings},
    )


@pytest.fixture
def shown(capsys, monkeypatch):
    def show(found, *, width=80, colors=False, stat="kl_final", **options):
        monkeypatch.setenv("COLUMNS", str(width))
        for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TERM"):
            monkeypatch.delenv(name, raising=False)
        if colors:
            monkeypatch.setenv("FORCE_COLOR", "1")
            monkeypatch.setenv("COLORTERM", "truecolor")
            monkeypatch.setenv("TERM", "xterm-256color")
        print_section(lens_section(found, stat, **options))
        return capsys.readouterr().out

    return show


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def labels(out: str) -> list[str]:
    return [line.split()[0] for line in plain(out).splitlines() if re.match(r" *(embed|\d+) ", line)]


@pytest.mark.parametrize("width", [60, 120])
@pytest.mark.parametrize(("n_rows", "n_pos"), [(5, 8), (31, 40)])
@pytest.mark.parametrize("colors", [False, True])
def test_every_guess_is_printed_and_no_line_is_wider_than_the_terminal(shown, width, n_rows, n_pos, colors):
    lines = plain(shown(sized(n_pos, n_rows), width=width, colors=colors)).splitlines()
    grid = lines[3:]
    assert max(map(cell_len, grid)) <= width
    guesses = re.findall(r"\b\d+\.\d+\b", "\n".join(grid))
    assert sorted(guesses) == sorted(f"{row}.{at}" for row in range(n_rows) for at in range(n_pos))
    # the last layer comes first in each block
    one = [*map(str, reversed(range(n_rows - 1))), "embed"]
    found = labels("\n".join(grid))
    assert found == one * (len(found) // len(one))


def test_for_a_long_text_the_last_positions_are_printed(shown):
    out = shown(sized(200, 2))
    assert f"Shown: the last {MAX_POSITIONS} of 200 positions." in out
    assert "1.199" in out
    assert "1.136" in out
    assert "1.135" not in out


def test_a_correct_guess_is_starred_and_a_long_one_is_cut(shown):
    heading, following, layer, embed = shown(lens()).splitlines()[4:8]
    assert heading.split() == ["layer", "<s>", "·a", "b"]
    assert following.split() == ["next", "·a", "b"]
    assert layer.split() == ["0", "·a*", "<b>x</b>…", "·a"]
    assert embed.split() == ["embed", "b", "b*", "b"]


def test_wide_characters_keep_the_columns_aligned(shown):
    found = sized(3, 2, token="日本語の話です")
    lines = [line for line in shown(found).splitlines()[4:] if line]
    assert {cell_len(line) for line in lines} == {cell_len(lines[0])}


def test_the_background_of_a_cell_has_the_color_of_its_statistic(shown):
    out = shown(sized(1, 3), colors=True)
    # KL 0, 1, 2 of at most 2: the ends and the middle of the scale
    ground = {
        guess: re.search(r"\x1b\[([\d;]*)m" + re.escape(guess), out)[1] for guess in ("0.0", "1.0", "2.0")
    }
    assert ground["0.0"].endswith("48;2;245;249;253")
    assert ground["1.0"].endswith("48;2;124;181;217")
    assert ground["2.0"].endswith("48;2;8;48;107")
    assert "Color: KL(final || layer), nats, from 0 (light) to 2.000 (dark)" in plain(out)
    ranks = plain(shown(sized(1, 3), colors=True, stat="rank_final"))
    assert "Color: rank of the model's final guess, from 1 (light) to 10 (dark)" in ranks


def test_without_colors_there_are_no_escape_codes(shown):
    out = shown(lens())
    assert "\x1b" not in out
    assert "Not shown without colors: KL(final || layer), nats" in out


def test_targets_have_a_table_with_every_row(shown):
    out = shown(deep_lens(48))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert [row[0] for row in rows] == [*map(str, reversed(range(48))), "embed"]
    # ranks 1, 2, 4, ... from the last layer on
    assert [row[1] for row in rows[:5]] == ["1", "2", "4", "8", "16"]


def test_the_table_of_targets_needs_no_other_statistic(shown):
    assert "rank of ·a" in shown(dataclasses.replace(lens(), statistics=("rank", "kl_final")))


def figures(section) -> list[Figure]:
    return [part for part in section.parts if isinstance(part, Figure)]


def test_a_page_draws_many_positions_in_figures_with_one_scale():
    *heatmaps, lines = figures(lens_section(sized(40, 2), ("entropy", "probability")))
    assert len(heatmaps) == 8
    drawn = [part.figure.data[0] for part in heatmaps[:4]]
    assert [len(each.x) for each in drawn] == [10, 10, 10, 10]
    assert [each.zmax for each in drawn] == [39.0] * 4
    assert [value for each in drawn for value in each.z[0]] == list(range(40))
    assert [trace.name.split()[0] for trace in lines.figure.data[::2]] == [*map(str, range(34, 40))]


@pytest.mark.parametrize("n_pos", [1, 11, 12, 13, 24])
def test_no_figure_of_a_page_is_wider_than_the_page(n_pos):
    parts = figures(lens_section(sized(n_pos, 2, token="a very long token"), "kl_final", lines=()))
    # the width between the page's margins
    assert max(part.figure.layout.width for part in parts) <= 1120


def test_chosen_positions_are_all_drawn():
    chosen = lens_section(sized(100, 2), "kl_final", positions=range(99), lines=())
    assert sum(part.figure.data[0].z.shape[1] for part in figures(chosen)) == 99
    assert "Shown" not in chosen.text


def test_only_terms_of_the_statistics_are_defined():
    terms = lens_section(lens(), "kl_final", lines=("rank_final",)).terms
    assert set(terms) == {"Logit lens", "Row embed", "KL(final || layer)", "Nat", "Rank"}


def test_high_belongs_to_a_single_statistic():
    with pytest.raises(mechlens.ArgumentError, match="high must be left out for several statistics, got 5"):
        lens_section(lens(), ("rank_final", "kl_final"), high=5)


def test_interleaved_lenses_have_a_section():
    both = mechlens.interleaved(sublayer_lens("attn_out", 0.0), sublayer_lens("mlp_out", 0.5))
    grid, *drawn = lens_section(both, "kl_final", lines=()).parts
    assert [row[0] for row in grid.rows] == ["next", "1 MLP", "1 attn", "0 MLP", "0 attn", "embed"]
    assert drawn[0].figure.layout.yaxis.ticktext[1] == "0 attn"


def test_json_has_the_likely_tokens_of_every_cell():
    found = lens().to_json()
    assert found["model"]["name"] == "tiny"
    assert len(found["rows"]) == 6
    row = found["rows"][4]
    assert (row["row"], row["layer"], row["pos"], row["token"], row["kl_final"]) == ("0", 0, 1, " a", 0.5)
    assert row["guesses"] == [
        {"guess": "<b>x</b> yes", "probability": 0.75},
        {"guess": " a", "probability": 0.125},
    ]


def test_the_summary_shows_the_last_position_from_the_last_row_down():
    table = deep_lens(30).summary(3)
    assert table["row"].tolist() == ["29", "28", "27"]
    assert table["rank_·a"].tolist() == [1, 2, 4]


@pytest.mark.parametrize("make", ["logit_variance", "input_probe", "tuned_lens", "vector_lens"])
def test_every_other_result_of_the_family_has_a_section(make, bundled):
    text = mechlens.sample_tokens(bundled, batch=20, seq_len=16)
    small = {"bases": (), "train_tokens": 250, "held_out_tokens": 20, "null_draws": 2}
    results = {
        "logit_variance": lambda: mechlens.logit_variance(bundled, text[0], nulls=2),
        "input_probe": lambda: mechlens.probe_input(bundled, text, **small),
        "tuned_lens": lambda: mechlens.train_tuned_lens(
            bundled, text, training=mechlens.Training(1, 16), held_out=1
        ),
        "vector_lens": lambda: mechlens.lens_vector(bundled, bundled.W_E[:2].detach(), top_k=3),
    }
    result = results[make]()
    section = mechlens.section(result)
    for figure in figures(section):
        assert figure.figure.data
    (table,) = [part for part in section.parts if not isinstance(part, Figure)]
    assert table.rows
    assert f"<b>{result.title}</b>" in result._repr_html_()
