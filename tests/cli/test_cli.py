"""The command line: its output, files and errors."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shlex
import subprocess
import sys

import pandas as pd
import pytest
import torch

from mechlens.models.protocol import describe
from mechlens.results import HeadScores, LogitLensResult, TunedLens
from mechlens.results import load as load_result
from tests.cli.commands import run
from tests.shared import STORIES, needs_shared

SMALL = ["--batch", "2", "--n-seeds", "1"]


@pytest.mark.parametrize("command", [[], ["reproduce"], ["heads"], ["lens"], ["models"]])
def test_help_has_an_example_and_the_common_options(capsys, command):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    if command:
        assert "Example: mechlens" in out
        for option in ("--json", "--quiet", "--device"):
            assert option in out, f"{command} has no {option}"


def test_no_arguments_show_the_help(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    assert "reproduce" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["reproduce", "--bogus"], "No such option: --bogus"),
        (["reproduce", "--batch", "many"], "Invalid value for '--batch'"),
        (["reproduce", "--batch", "0"], "Invalid value for '--batch'"),
        (["reproduce", "--model", "gpt22"], "did you mean gpt2"),
        (["models", "\udcff"], r"unknown model '\udcff'"),
        (["reproduce", "--model", "./nowhere"], "nowhere"),
        (["reproduce", "--seq-len", "300", *SMALL], "the largest seq_len that fits is 255"),
        (["reproduce", "--device", "quantum"], "quantum"),
        (["reproduce", "--dtype", "int3"], "dtype must be"),
        (["reproduce", "--out", __file__], "--out must be a folder, but"),
        (
            ["heads", "--kind", "induction", *SMALL],
            "unknown score 'induction' (did you mean induction_score?)",
        ),
        (["heads", "--out", "scores.pickle"], "--out must be a .html, .csv or .safetensors file"),
        (["heads", "--out", "no/such/folder/x.csv"], "does not exist"),
        (["heads", "--text", ""], "the text is empty"),
        (["heads", "--threshold", "2"], "Invalid value for '--threshold'"),
        (["heads", "--threshold", "nan"], "Invalid value for '--threshold'"),
        (["heads", "--text", "a b", "--jitter", "3"], "--jitter is for random tokens"),
        (["heads", "--text", "a b", "--kind", "copying_score"], "unknown score 'copying_score'"),
        (["lens"], "Missing argument"),
        (["lens", "a b", "--stat", "kl"], "--stat must be one of probability"),
        (["lens", "a b", "--stat", "rank_ the"], "--stat must be one of probability"),
        (["lens", "a b", "--out", "x.png"], "--out must be a .html, .csv or .safetensors file"),
        (["lens", "a b", "--read", "resid"], "--read must be one of"),
        (["lens", "a b", "--read", "L9H0"], "head L9H0 is out of range"),
        (["lens", "a b", "--read", "L1H2", "-l", "1"], "--layer must be left out where read names heads"),
        (["lens", "a b", "--json", "--csv"], "--json and --csv both print to standard output: choose one"),
        (["lens", "a b", "--decoder", "some"], "--decoder must be one of final_norm, norm_only, none"),
        (["lens", "a b", "--tuned-lens", "x", "--decoder", "none"], "leave out --decoder"),
        (["lens", "a b", "--tuned-lens", "no.safetensors"], "no such result file: no.safetensors"),
        (["lens", "a b", "--stat", "kl_input", "--out", "x.html"], "is not tied to its embedding"),
        (["lens", "a b", "--stat", "kl_input", "--out", "x.csv"], "is not tied to its embedding"),
        (["lens", "a b", "--stat", "rank_next", "--high", "1", "--out", "x.html"], "number above 1, got 1"),
        (["lens", "a b", "--high", "inf"], "--high must be a finite number above 0, got inf"),
        (["lens", "a b", "--target", " captain of"], "tokens, not one: ["),
        (["lens", "a b", "--layer", "4"], "layer 4 is out of range"),
        (["lens", ""], "the text is empty"),
        (["lens", "a b", "--position", "99"], "position 99 is out of range"),
        *(
            (["lens", "a b", "--position", each], "--position must be a number, or a nonempty range")
            for each in ("10:", "", "two")
        ),
        (["lens", "a b", "--last-blocks", "9"], "--last-blocks must be at most the model's 4 blocks, got 9"),
        (["models", "gpt22"], "did you mean gpt2"),
        (["reproduce", "--seed", "99999999999999999999"], "Invalid value for '--seed'"),
        (["models", "--like", "nothing at all"], "no known model has 'nothing at all'"),
        (
            ["models", "--verify", "--like", "nothing at all"],
            "no architecture has 'nothing at all' in its name",
        ),
        (["models", "--verify", "--clear-cache"], "--verify and --clear-cache exclude each other"),
        (["models", "--clear-cache", "--like", "gpt2"], "--like and --clear-cache exclude each other"),
        (["models", "gpt2", "--clear-cache"], "a name and --clear-cache exclude each other"),
        (["models", "gpt2", "--verify", "--like", "gpt2"], "a name and --like exclude each other"),
        (["models", "--out", "x.md"], "--out is for --verify: add --verify"),
        (["models", "--verify", "--out", "x.csv"], "--out must be a .md file, got x.csv"),
        (["models", "--verify", "--revision", "main"], "--revision needs the name of a model"),
        (["models", "--verify", "gpt22"], "did you mean gpt2"),
    ],
)
def test_a_wrong_argument_gives_one_line_and_exit_code_2(capsys, arguments, message, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert message in err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("mechlens: ")
    assert not out
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


def test_reproduce_writes_results_tables_and_a_report(capsys, tmp_path):
    code, out, _ = run(capsys, "reproduce", "--out", tmp_path / "deep" / "er", "--batch", 30, "--n-seeds", 1)
    assert code == 0
    assert "top-1 accuracy on the second copy, at least 0.90" in out
    assert "10 of 10 claims reproduced (the model's card)." in out
    folder = tmp_path / "deep" / "er"
    assert sorted(path.name for path in folder.iterdir()) == [
        "attention_patterns.csv",
        "attention_patterns.safetensors",
        "comparison.csv",
        "head_scores.csv",
        "head_scores.safetensors",
        "repeated_tokens.csv",
        "repeated_tokens.safetensors",
        "report.html",
    ]
    scores = load_result(folder / "head_scores.safetensors")
    table = pd.read_csv(folder / "head_scores.csv")
    (layer, head), best = next(scores.ranked("induction_score"))
    row = table[(table.kind == "induction_score") & (table.label == f"L{layer}H{head}")]
    assert row.score.item() == pytest.approx(best, abs=1e-6)
    assert f"L{layer}H{head}" in (folder / "report.html").read_text()
    assert set(pd.read_csv(folder / "comparison.csv").verdict) == {"reproduced"}


def test_json_and_quiet(capsys, tmp_path):
    code, out, err = run(capsys, "reproduce", "--out", tmp_path, "--json", "--seq-len", 10, *SMALL)
    assert (code, err) == (0, f"mechlens: wrote {tmp_path / 'report.html'} and 7 other files\n")
    found = json.loads(out)
    assert found["model"]["name"] == "mechlens-books"
    assert found["studies"] == ["heads"]
    assert found["comparisons"] == [], "nothing is published for 10 tokens"
    code, out, err = run(capsys, "reproduce", "--out", tmp_path, "--quiet", "--seq-len", 10, *SMALL)
    assert (code, out, err) == (0, "", "")


def test_heads_lists_the_heads_above_a_threshold_and_saves_all(capsys, tmp_path):
    path = tmp_path / "heads.safetensors"
    arguments = ["--kind", "induction_score", "--threshold", 0.5, "--out", path, "--seed", 3]
    code, out, _ = run(capsys, "heads", *arguments, *SMALL)
    assert code == 0
    saved = HeadScores.load(path)
    assert saved.seeds == (3,)
    above = int((saved.mean("induction_score") >= 0.5).sum())
    assert out.count("│ induction_score │") == above > 0
    rows = json.loads(run(capsys, "heads", *arguments, *SMALL, "--json")[1])["rows"]
    assert len(rows) == saved.mean("induction_score").numel()


def test_heads_on_a_text_and_as_a_table(capsys, tmp_path):
    path = tmp_path / "heads.csv"
    code, out, _ = run(
        capsys, "heads", "--text", "one two three one two three", "--out", path, "--kind", "induction_score"
    )
    assert code == 0
    assert "1 sequence" in out
    assert set(pd.read_csv(path).kind) == {"induction_score"}
    code, out, _ = run(capsys, "heads", "--threshold", 1, "--kind", "induction_score", *SMALL)
    assert code == 0
    assert "none" in out


def test_models_lists_and_shows(capsys):
    code, out, _ = run(capsys, "models")
    assert code == 0
    assert out.splitlines()[0].startswith("mechlens-books")
    code, out, _ = run(capsys, "models", "mechlens-books", "--json")
    shown = json.loads(out)
    assert shown["tied"] is False
    assert shown["positions"] == "rotary"
    assert shown["n_ctx"] == 512
    assert shown["n_params"] <= 5_000_000


def test_models_are_verified(capsys, tiny_directories, tmp_path):
    code, out, err = run(capsys, "models", "--verify", "--like", "gpt-neo", "--out", tmp_path / "found.md")
    assert code == 0
    assert err.endswith(f"wrote {tmp_path / 'found.md'}\n")
    text = (tmp_path / "found.md").read_text()
    for name in ("GPT-Neo", "GPT-NeoX", "GPT-NeoX (linear)"):
        assert f"| {name} | " in text
        assert f" {name} " in out
    assert text.split("\n\nWhat")[0].count("| GPT-") == 3
    assert "window 24" in out
    code, out, _ = run(capsys, "models", "--verify", tiny_directories / "gemma2", "--json")
    (found,) = json.loads(out)["models"]
    assert (code, found["name"], found["limits"], found["right"]) == (0, "gemma2", {"window": 8}, True)
    assert found["lengths"] == [7, 16]


@pytest.mark.filterwarnings("default")
def test_a_model_without_bos_says_so_in_one_line(capsys, tiny_directories):
    options = ["--model", tiny_directories / "qwen2", "--kind", "previous_token_score", "--seq-len", 5]
    code, out, err = run(capsys, "heads", *options, *SMALL)
    assert code == 0
    assert "no BOS" in out
    assert err.splitlines() == [
        "mechlens: this model has no BOS token: its sequences begin with an ordinary token"
    ]


def test_the_report_has_the_command_that_was_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["reproduce", "--no-bos", "--seq-len", "5", *SMALL, "--out", "a b", "--dtype", "bfloat16"]
    code, _, err = run(capsys, *arguments, "--quiet")
    assert (code, err) == (0, "")
    page = (tmp_path / "a b" / "report.html").read_text()
    command = html.unescape(re.search(r"mechlens reproduce [^<]*", page)[0])
    words = shlex.split(command)[1:]
    assert sorted(words) == sorted(arguments)
    assert load_result(tmp_path / "a b" / "head_scores.safetensors").model.dtype == "bfloat16"


def test_a_folder_in_place_of_a_file_is_refused_before_the_work(capsys, tmp_path):
    (tmp_path / "x.csv").mkdir()
    code, _, err = run(capsys, "heads", "--out", tmp_path / "x.csv")
    assert code == 2
    assert "it is a folder" in err


def test_version_is_printed(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert re.fullmatch(r"mechlens \d+\.\d+\.\d+\n", out)


TEXT = "one two three one two three one two"


def test_lens_prints_and_saves_what_each_layer_guesses(capsys, tmp_path):
    code, out, _ = run(capsys, "lens", TEXT, "--out", tmp_path / "lens.html")
    assert code == 0
    assert "embed" in out
    assert "*" in out, "the repetition is predicted"
    page = (tmp_path / "lens.html").read_text()
    assert "Plotly.newPlot" in page
    assert "default-src 'none'" in page
    assert "no published figure" not in page
    code, out, _ = run(capsys, "lens", TEXT, "--json", "--out", tmp_path / "lens.csv")
    table = pd.read_csv(tmp_path / "lens.csv", keep_default_na=False, na_values=[""])
    found = json.loads(out)
    cells = found["rows"]
    assert list(dict.fromkeys(cell["row"] for cell in cells)) == ["embed", "0", "1", "2", "3"]
    assert len(cells) == len(table) == 5 * (cells[-1]["pos"] + 1)
    assert cells[-1]["rank_next"] is None, "the last position has no label"
    assert cells[0]["kl_final"] == pytest.approx(float(table.kl_final.iloc[0]), abs=1e-6)
    assert [len(cell["guesses"]) for cell in cells] == [5] * len(cells)
    code, out, err = run(capsys, "lens", TEXT, "--csv")
    assert (code, err) == (0, "")
    assert out == (tmp_path / "lens.csv").read_text()
    code, out, err = run(capsys, "lens", TEXT, "--quiet")
    assert (code, out, err) == (0, "", "")


def test_every_option_of_lens_reaches_the_analysis(capsys, tmp_path):
    path = tmp_path / "lens.safetensors"
    arguments = ["--read", "resid_pre+attn_out", "--decoder", "norm_only", "--no-bos"]
    arguments += ["--layer", "1", "--layer", "3", "--target", " two", "--target", " three", "--top-k", "3"]
    arguments += ["--last-blocks", "1", "--dtype", "bfloat16"]
    code, out, _ = run(capsys, "lens", TEXT, *arguments, "--out", path)
    assert code == 0
    saved = LogitLensResult.load(path)
    assert (saved.read, saved.decoder) == ("resid_pre+attn_out", "LastBlocks(1, norm_only)")
    assert saved.rows == ("embed", "1", "3")
    assert saved.top_ids.shape[-1] == 3
    assert list(saved.target_ids) == [" two", " three"]
    assert (saved.prepend_bos, saved.model.processing, saved.model.dtype) == (False, False, "bfloat16")
    assert "rank of ·two" in out
    assert "Targets after" in out
    assert "resid_pre+attn_out, decoder LastBlocks(1, norm_only)\n" in out


def test_lens_colors_by_a_target_and_up_to_a_value(capsys, tmp_path):
    path = tmp_path / "lens.html"
    arguments = ["--stat", "rank_ two", "--high", "50.0", "--target", " two"]
    code, _, _ = run(capsys, "lens", TEXT, *arguments, "--out", path, "--quiet")
    assert code == 0
    page = path.read_text()
    assert "rank of ·two" in page
    assert json.dumps("≥ 50") in page
    command = html.unescape(re.search(r"mechlens lens [^<]*", page)[0])
    words = shlex.split(command)[1:]
    assert words == ["lens", *arguments, "--out", str(path), TEXT]


@pytest.mark.parametrize(
    "options",
    [
        ["--stat", "probability"],
        ["--stat", "rank_next"],
        ["--stat", "probability_ two", "--target", " two"],
        ["--stat", "entropy", "--target", " two"],
    ],
    ids=str,
)
def test_lens_prints_the_same_when_unused_statistics_are_skipped(capsys, tmp_path, options):
    """Statistics that are neither printed nor saved are not computed."""
    code, printed, _ = run(capsys, "lens", TEXT, *options)
    assert code == 0
    assert run(capsys, "lens", TEXT, *options, "--out", tmp_path / "lens.csv")[1].startswith(printed)


def test_lens_reads_a_text_longer_than_the_context(capsys):
    code, out, _ = run(capsys, "lens", "one two three " * 250, "--layer", "3", "--csv")
    assert code == 0
    assert len(out.splitlines()) > 2 * 512
    code, out, _ = run(capsys, "lens", "one two three " * 250, "--layer", "3")
    assert "Shown: the last 64 of" in out


@pytest.mark.parametrize(
    ("chosen", "positions"),
    [
        (["--position", "1", "--position", "-1"], (1, 8)),
        (["-p", "2:4", "-p", ":2", "-p", "-1"], (2, 3, 0, 1, 8)),
        (["-p", "-3:", "-p", "-5:-3"], (6, 7, 8, 4, 5)),
    ],
)
def test_positions_are_chosen_by_number_and_range(capsys, chosen, positions):
    code, out, _ = run(capsys, "lens", "a b c d e f g h", *chosen, "--json", "--layer", 0, "--bos")
    assert code == 0
    cells = json.loads(out)["rows"]
    assert tuple(cell["pos"] for cell in cells if cell["row"] == "0") == positions


def test_the_page_of_a_long_text_draws_the_chosen_positions_or_the_end(capsys, tmp_path):
    def drawn(*chosen):
        path = tmp_path / "lens.html"
        code, _, err = run(capsys, "lens", "one two three " * 250, "-l", 3, *chosen, "--out", path, "--quiet")
        assert (code, err) == (0, "")
        page = path.read_text()
        data = [json.loads(each) for each in re.findall(r'data">(\{"data".*)</script>', page)]
        heat = [each["data"][0] for each in data if each["data"][0]["type"] == "heatmap"]
        return sum(len(each["x"]) for each in heat), page

    count, page = drawn()
    assert count == 64
    assert re.search("Shown: the last 64 of [0-9,]+ positions", page)
    count, page = drawn("--position", "5:75")
    assert count == 70
    assert "Shown: the last" not in page
    assert "--position 5:75" in page, "the page says how it was made"


def test_heads_are_chosen_by_name(capsys):
    arguments = ["--read", "L3H5", "--read", "1.2", "--json"]
    code, out, _ = run(capsys, "lens", TEXT, *arguments)
    assert code == 0
    assert {row["row"] for row in json.loads(out)["rows"]} == {"embed", "L1H2", "L3H5"}


def test_the_help_of_lens_lists_accepted_values(capsys):
    out = " ".join(run(capsys, "lens", "--help")[1].split())
    assert "kl_input (tied models only)" in out
    assert "float32, bfloat16, float16, float64" in out
    assert "L3H5 (repeatable)" in out
    assert "10:40" in out


def test_lens_reads_through_a_tuned_lens(capsys, tmp_path, bundled):
    model = describe(bundled)
    size = (4, model.d_model, model.d_model)
    nan = torch.full((5,), torch.nan)
    names = ("steps", "batch_tokens", "length", "train_tokens", "held_out_tokens")
    identity = TunedLens(
        model=model,
        rows=("embed", "0", "1", "2"),
        weight=torch.zeros(size),
        bias=torch.zeros(size[:2]),
        kl_plain=nan,
        kl_tuned=nan,
        source="trained",
        **dict.fromkeys(names),
        learning_rate=None,
        seed=None,
        prepend_bos=None,
    )
    path = identity.save(tmp_path / "tuned.safetensors")
    code, out, _ = run(capsys, "lens", TEXT, "--tuned-lens", path, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["decoder"] == "tuned_lens"
    plain = json.loads(run(capsys, "lens", TEXT, "--json")[1])
    # a lens of identity maps changes nothing
    for cell, own in zip(found["rows"], plain["rows"], strict=True):
        # at the last layer it is 0 up to rounding, which depends on the batch
        assert cell["kl_final"] == pytest.approx(own["kl_final"], rel=1e-5, abs=1e-6)
    code, _, err = run(capsys, "lens", TEXT, "--tuned-lens", path, "--raw")
    assert code == 2
    assert "it was trained on processed weights (processing=True), but this model has unprocessed" in err
    raw = dataclasses.replace(identity, model=dataclasses.replace(model, processing=False))
    saved = raw.save(tmp_path / "raw.safetensors")
    code, out, _ = run(capsys, "lens", TEXT, "--tuned-lens", saved, "--json")
    assert code == 0
    assert not json.loads(out)["model"]["processing"], "the lens says which weights it needs"


@needs_shared
def test_models_shows_a_directory(capsys):
    code, out, _ = run(capsys, "models", STORIES)
    assert code == 0
    assert any(line.split() == ["tied", "yes"] for line in out.splitlines())
    assert "260,032" in out


def test_as_a_program_it_exits_with_one_line_and_no_traceback():
    """In a real process, with an exit code and Python's own output."""
    program = """
import atexit, sys
from mechlens.cli import main
atexit.register(lambda: print(*sys.modules))
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "reproduce", "--model", "gpt22"],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    # its import would take longer than everything else for a mistyped name
    assert not {"transformers", "transformer_lens"} & set(done.stdout.split())
