"""The lens in a terminal, at the widths that people have."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from rich.cells import cell_len

from mechlens.results import LogitLensResult
from mechlens.terminal import lens_json, print_json, print_lens
from mechlens.terminal.lens import LAST_ROWS, MAX_POSITIONS, MAX_ROWS
from tests.hand_made import deep_lens, lens


def sized(n_pos: int, n_rows: int, *, token: str = " word") -> LogitLensResult:
    """A lens whose guess in row r at position p is `r.p`, and whose KL is r."""
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
        entropy=kl,
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
    def show(found, *, width=80, colours=False, stat="kl", **options):
        monkeypatch.setenv("COLUMNS", str(width))
        for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TERM"):
            monkeypatch.delenv(name, raising=False)
        if colours:
            monkeypatch.setenv("FORCE_COLOR", "1")
            monkeypatch.setenv("COLORTERM", "truecolor")
            monkeypatch.setenv("TERM", "xterm-256color")
        print_lens(found, stat, **options)
        return capsys.readouterr().out

    return show


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("n_rows", [5, 13])
@pytest.mark.parametrize("n_pos", [8, 40])
@pytest.mark.parametrize("colours", [False, True])
def test_every_guess_is_there_and_no_line_is_too_long(shown, width, n_rows, n_pos, colours):
    lines = plain(shown(sized(n_pos, n_rows), width=width, colours=colours)).splitlines()
    table = lines[3:]  # title and what the colours mean wrap by themselves
    assert max(map(cell_len, table)) <= width
    guesses = re.findall(r"\b\d+\.\d+\b", "\n".join(table))
    assert sorted(guesses) == sorted(f"{row}.{at}" for row in range(n_rows) for at in range(n_pos))
    assert "Shown" not in "\n".join(lines[:4])
    # layers go upwards
    labels = [line.split()[0] for line in table if re.match(r" *(embed|\d+) ", line)]
    one = [*map(str, reversed(range(n_rows - 1))), "embed"]
    assert labels == one * (len(labels) // len(one))


def test_stretches_are_as_few_as_the_width_allows(shown):
    stretches = {
        width: plain(shown(sized(40, 5), width=width)).count("embed") for width in (60, 80, 120, 200)
    }
    # the labels take 5, a column 7 (five letters, a star, a gap): 7, 10, 16 and 27 columns
    assert stretches == {60: 6, 80: 4, 120: 3, 200: 2}


def _labels(out: str) -> list[str]:
    return [line.split()[0] for line in out.splitlines() if re.match(r" *(embed|\d+) ", line)]


def test_of_thirty_layers_that_differ_each_has_its_line(shown):
    out = shown(sized(4, 31))
    assert _labels(out) == [*map(str, reversed(range(30))), "embed"]
    assert "Shown" not in out


def test_layers_of_a_deep_model_with_the_same_guesses_are_told_in_one_line(shown):
    out = shown(deep_lens(30, tokens=("<s>", " a")))
    assert "Shown: 10 of 31 rows, one for each run of layers with like guesses. --csv has all." in out
    lines = [line.strip() for line in out.splitlines()]
    # the guess is ` a` in the last five layers, another one before; the last eight are always shown
    start = lines.index(next(line for line in lines if line.startswith("29 ")))
    assert [line.split()[0] for line in lines[start : start + 9]] == [*map(str, range(29, 20, -1))]
    assert lines[start + 9] == "layers 0 to 20: as layer 21"
    assert lines[start + 10].split() == ["embed", "guess", "guess"]
    # a model of few layers shows its colours in each
    assert _labels(shown(deep_lens(24, tokens=("<s>",)))) == [*map(str, reversed(range(24))), "embed"]


@pytest.mark.parametrize("n_layers", [48, 96])
def test_of_a_very_deep_model_the_likest_layers_are_told_in_one_line(shown, n_layers):
    found = sized(4, n_layers + 1)
    # layers 3 to 9 differ from one another in one guess of four, all others in all
    found.top_ids[4:11, :, 1:] = found.top_ids[10, :, 1:]
    out = shown(found)
    labels, runs = _labels(out), re.findall(r"layers (\d+) to (\d+): as layer (\d+)(.*)", out)
    assert len(labels) + len(runs) <= MAX_ROWS
    assert ("3", "8", "9", " in 75% of the guesses") in [(first, *rest) for first, *rest in runs]
    assert labels[:LAST_ROWS] == [str(n_layers - 1 - at) for at in range(LAST_ROWS)]
    assert labels[-1] == "embed"
    told = {layer for first, last, *_ in runs for layer in range(int(first), int(last) + 1)}
    assert told.isdisjoint(map(int, labels[:-1]))
    assert told | set(map(int, labels[:-1])) == set(range(n_layers))
    assert all(shown in labels for *_, shown, _ in runs)
    assert max(map(cell_len, shown(found, width=40).splitlines()[5:])) <= 40


def test_heads_each_have_their_line(shown):
    heads = dataclasses.replace(
        sized(2, 49), component="result", rows=("embed", *(f"L0H{head}" for head in range(48)))
    )
    out = shown(heads)
    assert "Shown" not in out
    assert all(f"L0H{head} " in out for head in range(48))


def test_of_a_long_text_the_last_positions_are_shown_and_it_says_so(shown):
    out = shown(sized(200, 2))
    assert f"Shown: the last {MAX_POSITIONS} of 200 positions. --csv has all, --position chooses." in out
    assert "1.199" in out
    assert "1.136" in out
    assert "1.135" not in out


def test_what_follows_is_starred_and_what_is_long_is_shortened(shown):
    lines = shown(lens()).splitlines()
    cells = [line.split() for line in lines if line]
    above, layer, embed, below = cells[3:7]
    assert above == ["·a", "b"]
    assert layer == ["0", "·a*", "<b>x</…", "·a"]
    assert embed == ["embed", "b", "b*", "b"]
    assert below == ["<s>", "·a", "b"]
    wide = "\n".join(shown(lens(), width=120).splitlines())
    assert "<b>x</b>…" in wide


def test_wide_characters_keep_the_columns(shown):
    found = sized(3, 2, token="日本語の話です")
    lines = [line for line in shown(found).splitlines()[3:] if line]
    assert {cell_len(line) for line in lines} == {cell_len(lines[0])}
    assert "日本語…" in lines[-1]


def test_the_ground_has_the_statistics_colour(shown):
    out = shown(sized(1, 3), colours=True)
    # KL 0, 1, 2 of at most 2: the ends of the scale and its middle
    ground = {
        guess: re.search(r"\x1b\[([\d;]*)m" + re.escape(guess), out)[1] for guess in ("0.0", "1.0", "2.0")
    }
    assert ground["0.0"].endswith("48;2;245;249;253")
    assert ground["1.0"].endswith("48;2;124;181;217")
    assert ground["2.0"].endswith("48;2;8;48;107")
    assert ground["0.0"].startswith("38;2;0;0;0")
    assert ground["2.0"].startswith("38;2;255;255;255")
    assert "KL(final || layer), nats, from 0" in out
    assert "to 2.000\n" in plain(out)


def test_the_range_of_the_colours_is_said(shown):
    assert re.search(r"Colour: rank .* from 1 +to 10\n", plain(shown(sized(1, 3), colours=True, stat="rank")))
    assert "to 1.000 and beyond" in plain(shown(sized(1, 3), colours=True, high=1.0))


@pytest.mark.parametrize("colours", [False, True])
def test_without_colours_there_is_no_escape_and_it_says_so(shown, monkeypatch, capsys, colours):
    if colours:
        shown(lens(), colours=True)
        monkeypatch.setenv("NO_COLOR", "1")
        print_lens(lens())
        out = capsys.readouterr().out
        assert "48;2" not in out
    else:
        out = shown(lens())
        assert "\x1b" not in out
    assert "Without colours KL(final || layer), nats is not shown; --csv and --json have it." in plain(out)


def test_targets_stand_in_a_table_of_their_own(shown):
    out = shown(lens())
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert "Targets after b, position 2" in out
    assert rows == [["0", "2", "1"], ["embed", "7", "0.25"]]


def test_the_table_of_targets_has_every_row_of_a_deep_model(shown):
    out = shown(deep_lens(48))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert [row[0] for row in rows] == [*map(str, reversed(range(48))), "embed"]
    # ranks 1, 2, 4, ... from the last layer on
    assert [row[1] for row in rows[:5]] == ["1", "2", "4", "8", "16"]


def test_what_is_undefined_is_refused(shown):
    with pytest.raises(ValueError, match="not tied to its embedding"):
        shown(lens(), stat="kl_input")


def test_json_has_every_cell_with_its_likely_tokens():
    found = lens_json(lens())
    assert found["rows"] == ("embed", "0")
    assert found["model"]["name"] == "tiny"
    assert len(found["cells"]) == 6
    cell = found["cells"][4]
    assert (cell["row"], cell["layer"], cell["pos"], cell["token"]) == ("0", 0, 1, " a")
    assert "guess" not in cell
    assert cell["guesses"] == [
        {"guess": "<b>x</b> yes", "probability": 0.75},
        {"guess": " a", "probability": 0.125},
    ]
    assert cell["kl_final"] == 0.5


def test_json_of_heads_has_their_layer_and_head(capsys):
    heads = dataclasses.replace(lens(), component="result", rows=("embed", "L12H3"))
    print_json(lens_json(heads))
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [(cell["row"], cell["layer"], cell["head"]) for cell in cells[2:4]] == [
        ("embed", -1, None),
        ("L12H3", 12, 3),
    ]
