"""`mechlens patch` and `mechlens ablate`: their output, files and errors."""

from __future__ import annotations

import html
import json
import re
import shlex

import pandas as pd
import pytest

from mechlens.analyses.patching import KL, LogitDiff, Mean, Patching, Resampled, ablate_heads, ablate_mlps
from mechlens.results import PatchGridResult
from mechlens.text.prompts import RepeatedTokens
from tests.cli.commands import refused, run
from tests.close import assert_same

SMALL = ["--seq-len", "6", "--batch", "2"]
TEXT, OTHER = "one two three one two", "one two four one two"


@pytest.mark.parametrize("command", [["patch"], ["ablate", "heads"], ["ablate", "mlps"]])
def test_help_has_an_example_and_the_common_options(capsys, command):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert f"Example: mechlens {' '.join(command)}" in " ".join(out.split())
    for option in ("--json", "--quiet", "--seed", "--device", "--dtype", "--revision", "--out"):
        assert option in out, f"{command} has no {option}"
    code, out, _ = run(capsys, "ablate", "--help")
    assert code == 0
    assert "Example: mechlens ablate heads" in out
    assert "mlps" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["patch", "--site", "mlp"], "--site must be one of resid_pre, resid_mid"),
        (["patch", "--from", "second-half"], "--from must be one of first-half, zero, mean, resample"),
        (["patch", "--by", "neuron"], "--by must be one of position, head, layer"),
        (["patch", "--metric", "accuracy"], "--metric must be one of loss, log_prob"),
        (["patch", "--by", "head", *SMALL], "--by head needs --site q, k, v, z"),
        (["patch", "--layer", "4", *SMALL], "layer 4 is out of range"),
        (["patch", "--corrupted", " a"], "--corrupted is for a text: add --text"),
        (["patch", "--from", "corrupted"], "--from must be one of first-half"),
        (["patch", "--metric", "logit_diff"], "needs --text, --target and --against"),
        (["patch", "--text", "a b", "--from", "first-half"], "--from first-half is for random tokens"),
        (["patch", "--text", "a b", "--from", "zero", "--batch", "2"], "--batch is for random tokens"),
        (["patch", "--text", "a b", "--from", "zero", "--metric", "log_prob"], "needs --target"),
        (["patch", "--text", "a b", "--into", "corrupted"], "--into corrupted needs --corrupted TEXT"),
        (["patch", "--text", "a b", "--into", "both"], "--into must be 'clean' or 'corrupted'"),
        (["patch", "--text", "a b", "--metric", "logit_diff"], "needs --target and --against"),
        (
            ["patch", "--text", "a b", "--corrupted", "a b c"],
            "the texts must have the same number of tokens, got 3, [",
        ),
        (
            ["patch", "--text", "a b", "--from", "zero", "--metric", "log_prob", "--target", " captain of"],
            "tokens, not one: [",
        ),
        (["patch", "--head", "1", "--site", "z"], "a head is written L5H5, 5.5"),
        (["patch", "--text", "a b", "--target", " a"], "--metric loss has no --target: leave it out"),
        (["patch", "--text", "a b", "--against", " a"], "--metric loss has no --against: leave it out"),
        (["patch", "--seq-len", "300"], "the largest seq_len that fits is 255"),
        (["patch", "--resume", "x.json"], "resume must be a .safetensors file"),
        (
            ["patch", "--resume", "x.safetensors", "--out", "x.safetensors"],
            "--out and --resume must be different files, got x.safetensors for both",
        ),
        (["patch", "--out", "x.png"], "--out must be a .html, .csv or .safetensors file"),
        (["ablate", "heads", "--how", "half"], "--how must be one of mean, resample, zero"),
        (["ablate", "heads", "--out", "no/such/x.csv"], "does not exist"),
        (["ablate", "mlps", "--seq-len", "300"], "the largest seq_len that fits is 255"),
        (["ablate", "mlps", "--out", "x.pickle"], "--out must be a .html, .csv or .safetensors file"),
        (["ablate", "heads", "--bogus"], "No such option: --bogus"),
        (["ablate", "neurons"], "No such command 'neurons'"),
    ],
)
def test_a_wrong_argument_gives_one_line_and_exit_code_2(capsys, arguments, message, monkeypatch, tmp_path):
    refused(capsys, arguments, message, monkeypatch, tmp_path)


def saved(capsys, tmp_path, *arguments) -> PatchGridResult:
    path = tmp_path / "x.safetensors"
    code, out, err = run(capsys, *arguments, "--out", path, "--quiet")
    assert (code, out, err) == (0, "", "")
    return PatchGridResult.load(path)


def test_the_articles_experiment_has_two_names(capsys, tmp_path, bundled):
    expected = ablate_mlps(bundled, on=RepeatedTokens(6, batch=2, seeds=[3]))
    assert_same(saved(capsys, tmp_path, "patch", *SMALL, "--seed", 3), expected)
    assert_same(saved(capsys, tmp_path, "ablate", "mlps", *SMALL, "--seed", 3), expected)


def test_ctrl_c_says_that_the_same_command_resumes(capsys, monkeypatch, tmp_path):
    from mechlens.analyses.patching import grid

    file = tmp_path / "progress.safetensors"
    arguments = ["patch", *SMALL, "--json"]
    whole = run(capsys, *arguments)
    note = grid._Progress.note
    calls = []

    def interrupted(self, *args):
        note(self, *args)
        calls.append(args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(grid._Progress, "note", interrupted)
        code, out, err = run(capsys, *arguments, "--resume", file)
    assert (code, out, len(calls)) == (130, "", 1)
    assert err.strip() == f"mechlens: progress is saved in {file}: run the same command to resume"
    code, out, err = run(capsys, *arguments, "--resume", file)
    assert (code, err) == (0, whole[2])
    assert_same(json.loads(out), json.loads(whole[1]))


@pytest.mark.parametrize("how", ["mean", "zero", "resample"])
def test_both_ways_to_ablate_heads(capsys, tmp_path, bundled, how):
    expected = ablate_heads(bundled, how, on=RepeatedTokens(6, batch=2, seeds=[3], prepend_bos=False))
    arguments = [*SMALL, "--seed", 3, "--no-bos"]
    assert_same(saved(capsys, tmp_path, "ablate", "heads", "--how", how, *arguments), expected)
    patched = ["patch", "--site", "z", "--by", "head", "--from", how]
    assert_same(saved(capsys, tmp_path, *patched, *arguments), expected)


def test_every_option_of_patch_reaches_the_analysis(capsys, tmp_path, bundled):
    drawn, resampled = (RepeatedTokens(6, batch=2, seeds=[0]).draw(bundled, seed).tokens for seed in (1, 2))
    mean = RepeatedTokens(6, batch=32, seeds=[0]).draw(bundled, 2).tokens
    options = ["--site", "resid_post", "--layer", 1, "--layer", 3, "--metric", "kl", "--seed", 1]
    for source, values in (("mean", Mean(mean)), ("resample", Resampled(resampled, seed=1))):
        expected = Patching(bundled, drawn, metric=KL(at=range(7, 12))).grid(
            "resid_post", values=values, over="layer", layers=[1, 3]
        )
        assert_same(
            saved(capsys, tmp_path, "patch", "--from", source, "--by", "layer", *options, *SMALL), expected
        )


def test_heads_and_the_patched_run_reach_the_analysis(capsys, tmp_path, bundled):
    expected = Patching(bundled, TEXT, OTHER).grid(
        "z", over=("layer", "head"), into="clean", heads=["L1H2", "L3H5"]
    )
    arguments = ["--site", "z", "--by", "head", "--text", TEXT, "--corrupted", OTHER, "--into", "clean"]
    found = saved(capsys, tmp_path, "patch", *arguments, "--head", "L1H2", "--head", "3.5")
    assert_same(found, expected)


def test_a_text_is_denoised(capsys, tmp_path, bundled):
    expected = Patching(bundled, TEXT, OTHER, metric=LogitDiff(" three", " four")).grid("resid_pre")
    arguments = ["--site", "resid_pre", "--text", TEXT, "--corrupted", OTHER, "--metric", "logit_diff"]
    arguments += ["--target", " three", "--against", " four"]
    assert_same(saved(capsys, tmp_path, "patch", *arguments), expected)
    code, out, _ = run(capsys, "patch", *arguments, "--top", 2)
    assert code == 0
    assert "recovered" in out
    ranked = expected.effect.abs().flatten().argsort(descending=True).tolist()
    # layers, each with 6 positions
    best, third = (divmod(ranked[at], 6) for at in (0, 2))
    assert f"L{best[0]} at {best[1]} " in out
    assert f"{float(expected.effect[best]):+.3f}" in out
    assert f"L{third[0]} at {third[1]} " not in out


def test_the_table_lists_the_largest_and_json_has_all(capsys):
    code, out, _ = run(capsys, "ablate", "heads", *SMALL, "--top", 3)
    assert code == 0
    listed = re.findall(r"L\dH\d", out)
    assert len(listed) == 3
    assert "L1H2" in listed, "the previous-token head"
    assert "standard error" in out
    code, out, _ = run(capsys, "ablate", "heads", *SMALL, "--json")
    found = json.loads(out)
    assert len(found["rows"]) == 24
    ranked = sorted(found["rows"], key=lambda cell: -abs(cell["effect"]))
    assert [cell["label"] for cell in ranked[:3]] == listed
    assert found["rows"][0]["recovered"] is None, "there is no corrupted run"


def test_a_page_has_the_figures_and_the_command_that_wrote_it(capsys, tmp_path):
    path = tmp_path / "x.html"
    arguments = ["--site", "z", "--from", "zero", "--by", "head", "--no-bos", "--seq-len", "6", "--top", "4"]
    arguments += ["--out", str(path)]
    code, _, err = run(capsys, "patch", *arguments, "--quiet")
    assert (code, err) == (0, "")
    page = path.read_text()
    command = html.unescape(re.search(r"mechlens patch [^<]*", page)[0])
    assert sorted(shlex.split(command)[2:]) == sorted(arguments)
    assert page.count('class="plot"') == 2
    assert "no published figure" not in page
    code, _, _ = run(capsys, "ablate", "mlps", *SMALL, "--out", path, "--quiet")
    assert code == 0
    assert "mechlens ablate mlps --seq-len 6 --batch 2" in html.unescape(path.read_text())


def test_a_table_has_a_row_for_each_cell(capsys, tmp_path):
    path = tmp_path / "x.csv"
    code, _, _ = run(capsys, "patch", *SMALL, "--out", path, "--quiet")
    assert code == 0
    table = pd.read_csv(path)
    assert len(table) == 4 * 6
    assert set(table.pos) == set(range(7, 13))
