"""`mechlens attribution`, `attention` and `train-lens`: their output, files and errors."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil

import pandas as pd
import pytest

from mechlens.analyses.attention import attention_patterns
from mechlens.analyses.attribution import direct_logit_attribution
from mechlens.analyses.tuned_lens import Training, train_tuned_lens
from mechlens.models.run.sampling import sample_tokens
from mechlens.results import AttentionPatterns, HeadScores, LogitAttribution, TunedLens
from mechlens.text.corpus import token_windows
from tests.cli.commands import refused, run
from tests.close import assert_same

TEXT = "Mr. Pickwick met Mr. Pickwick"
TRAINED = ["--steps", "3", "--batch-tokens", "32", "--length", "16"]


@pytest.mark.parametrize("command", ["attribution", "attention", "train-lens"])
def test_help_has_an_example_and_the_common_options(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"Example: mechlens {command}" in " ".join(out.split())
    for option in ("--json", "--quiet", "--device", "--dtype", "--revision", "--no-cache", "--out"):
        assert option in out, f"{command} has no {option}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attribution"], "Missing argument 'text'"),
        (["attribution", ""], "the text is empty"),
        (["attribution", "a b", "--target", " captain of"], "tokens, not one: ["),
        (["attribution", "a b", "--position", "9"], "position 9 is out of range"),
        (["attribution", "a b", "--top", "0"], "Invalid value for '--top'"),
        (["attribution", "a b", "--neurons", "-1"], "Invalid value for '--neurons'"),
        (["attribution", "a b", "--neurons", "3073"], "--neurons must be at most the model's 3,072"),
        (["attribution", "a b", "--out", "x.png"], "--out must be a .html, .csv or .safetensors file"),
        (["attention", "a b"], "Missing option '--head'"),
        (["attention", "a b", "--head", "3.x"], "'3.x'"),
        (["attention", "a b", "--head", "L9H0"], "head L9H0 is out of range: the model has layers 0 to 3"),
        (["attention", "a b", "--head", "L1H2", "--out", "no/x.csv"], "does not exist"),
        (["attention", "a b", "--head", "L1H2", "--chat"], "this model has no chat template"),
        (["attention", "a b", "--head", "L1H2", "--chat", "--no-bos"], "leave out --no-bos"),
        (["attribution", "a b", "--chat", "--bos"], "leave out --bos"),
        (["lens", "a b", "--chat", "--bos"], "the chat template places BOS"),
        (["heads", "--chat"], "--chat needs --text"),
        (["patch", "--chat"], "--chat is for a text: add --text"),
        (["train-lens"], "Missing option '--out'"),
        (["train-lens", "--out", "x.html"], "--out must be a .safetensors file"),
        (["train-lens", "no.txt", "--out", "x.safetensors"], "no.txt does not exist"),
        (["train-lens", "--out", "x.safetensors", "--held-out-file", "no.txt"], "no.txt does not exist"),
        (["train-lens", "--out", "x.safetensors", "--resume", "x.safetensors"], "must be different files"),
        (["train-lens", "--out", "x.safetensors", "--learning-rate", "0"], "--learning-rate must be"),
    ],
)
def test_a_wrong_argument_gives_one_line_and_exit_code_2(capsys, arguments, message, monkeypatch, tmp_path):
    refused(capsys, arguments, message, monkeypatch, tmp_path)


def test_attribution_matches_the_function(capsys, tmp_path, bundled):
    path = tmp_path / "x.safetensors"
    arguments = ["attribution", TEXT, "--target", " was", "--against", " is", "--no-bos", "--position", "3"]
    assert run(capsys, *arguments, "--out", path, "--quiet") == (0, "", "")
    expected = direct_logit_attribution(
        bundled, TEXT, " was", against=" is", positions=[3], prepend_bos=False
    )
    assert_same(LogitAttribution.load(path), expected)
    found = json.loads(run(capsys, *arguments, "--json")[1])
    rows = found["rows"]
    assert {(row["target"], row["against"], row["pos"]) for row in rows} == {(" was", " is", 3)}
    assert sum(row["contribution"] for row in rows) == pytest.approx(float(expected.logit), abs=1e-4)


def test_the_table_of_an_attribution_sums_to_the_logit(capsys):
    code, out, _ = run(capsys, "attribution", "The captain of the", "--target", " ship", "--top", "3")
    assert code == 0
    added = [float(number) for number in re.findall(r"[+-]\d+\.\d{3}", out.replace("\N{MINUS SIGN}", "-"))]
    # 3 components of layers, two others, the rest and the sum; each is rounded
    assert len(added) == 7
    assert sum(added[:-1]) == pytest.approx(added[-1], abs=0.004)
    assert "“·ship”" in out


def test_the_neurons_of_an_attribution_match_the_function(capsys, bundled):
    arguments = ["attribution", TEXT, "--target", " was", "--position", "3", "--neurons", "2"]
    expected = direct_logit_attribution(bundled, TEXT, " was", positions=[3], neurons=2)
    found = json.loads(run(capsys, *arguments, "--json")[1])["neurons"]
    labels = expected.neurons_to_dataframe()["label"].tolist()
    assert [row["label"] for row in found] == labels
    assert [row["contribution"] for row in found] == pytest.approx(
        expected.neurons.contributions.flatten().tolist(), abs=1e-5
    )
    out = run(capsys, *arguments)[1]
    for label in (*labels, "3,070 others", "MLP biases", "sum of MLPs"):
        assert f"│ {label} " in out


def test_attention_matches_the_function(capsys, tmp_path, bundled):
    path = tmp_path / "x.safetensors"
    arguments = ["attention", TEXT, "--head", "L3H5", "--head", "L1H2", "--no-bos"]
    assert run(capsys, *arguments, "--out", path, "--quiet") == (0, "", "")
    expected = attention_patterns(bundled, TEXT, ["L3H5", "L1H2"], prepend_bos=False)
    assert_same(AttentionPatterns.load(path), expected)
    found = json.loads(run(capsys, *arguments, "--json")[1])
    assert found["token_strings"] == list(expected.token_strings)
    row = [each["attention"] for each in found["rows"] if (each["layer"], each["dest"]) == (1, 3)]
    assert row == pytest.approx(expected.patterns[1, 3, :4].tolist(), abs=1e-5)
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    # the previous-token head
    assert re.search(r"2 +│ ·P +│ .* 1\.00 \. \(1\)", out), out


def test_pages_have_the_figures_and_the_command_that_wrote_them(capsys, tmp_path):
    path = tmp_path / "x.html"
    for arguments, place in (
        (["attribution", "--target", " met", "--no-bos", "--out", str(path), TEXT], 'class="plot"'),
        (["attention", "--head", "L3H5", "--head", "L1H2", "--out", str(path), TEXT], 'class="view"'),
    ):
        code, _, err = run(capsys, *arguments, "--quiet")
        assert (code, err) == (0, "")
        page = path.read_text()
        command = html.unescape(re.search(rf"mechlens {arguments[0]} [^<]*", page)[0])
        assert sorted(shlex.split(command)[1:]) == sorted(arguments)
        assert place in page


@pytest.mark.parametrize("command", [["attribution"], ["attention", "--head", "L3H5"]])
def test_tables_match_the_results(capsys, tmp_path, command):
    path = tmp_path / "x.csv"
    assert run(capsys, *command, TEXT, "--out", path, "--quiet")[0] == 0
    assert len(pd.read_csv(path)) > 30


def test_a_lens_is_trained_on_files_and_used(capsys, tmp_path, bundled):
    text, other = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text("The captain of the ship was on the deck. " * 40)
    other.write_text("He saw the sea, and the sea saw him. " * 20)
    path, file = tmp_path / "lens.safetensors", tmp_path / "progress.safetensors"
    arguments = ["train-lens", text, "--held-out-file", other, "--held-out", 3, "--learning-rate", 0.001]
    arguments += ["--seed", 2, "--no-bos", *TRAINED, "--resume", file, "--out", path]
    code, out, err = run(capsys, *arguments)
    assert code == 0
    assert err == f"mechlens: wrote {path}\n"
    expected = train_tuned_lens(
        bundled,
        token_windows(bundled, text, length=16, prepend_bos=False),
        training=Training(steps=3, batch_tokens=32, learning_rate=0.001, seed=2),
        held_out=3,
        held_out_corpus=token_windows(bundled, other, length=16, prepend_bos=False),
    )
    assert_same(TunedLens.load(path), expected)
    for value in (*expected.kl_plain[:4], *expected.kl_tuned[:4]):
        assert f"{float(value):.3f}" in out
    # nothing left to do
    assert run(capsys, *arguments, "--quiet") == (0, "", "")
    assert_same(TunedLens.load(path), expected)
    code, out, _ = run(capsys, "lens", TEXT, "--tuned-lens", path, "--json")
    assert code == 0
    assert json.loads(out)["decoder"] == "tuned_lens"


def test_a_lens_is_trained_on_text_from_the_model(capsys, tmp_path, bundled, monkeypatch):
    monkeypatch.setattr("mechlens.cli.options.OWN_WINDOWS", 12)
    path = tmp_path / "lens.safetensors"
    code, out, _ = run(capsys, "train-lens", "--out", path, *TRAINED, "--json", "--seed", 4)
    assert code == 0
    written = sample_tokens(bundled, batch=12, seq_len=16, seed=4)
    expected = train_tuned_lens(bundled, written, training=Training(3, 32, seed=4))
    assert_same(TunedLens.load(path), expected)
    rows = json.loads(out)["rows"]
    assert [row["row"] for row in rows] == ["embed", "0", "1", "2", "3"]
    assert [row["kl_tuned"] for row in rows] == pytest.approx(expected.kl_tuned.tolist(), rel=1e-3, abs=1e-5)


# -- chat ------------------------------------------------------------------------------------------


@pytest.fixture
def chatting(tiny_directories, tmp_path):
    """A tiny model with a chat template."""
    from transformers import AutoTokenizer

    directory = tmp_path / "model"
    shutil.copytree(tiny_directories / "llama", directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' ' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %} bot{% endif %}"
    )
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("command", "read"),
    [
        (["attribution", "hi"], lambda found: ["<s>", *"user hi bo", found["rows"][0]["token"]]),
        (["attention", "hi", "--head", "L0H0"], lambda found: found["token_strings"]),
        (["patch", "--text", "hi", "--from", "zero"], lambda found: found["strings"]),
        (["patch", "--text", "hi", "--corrupted", "ho", "--metric", "kl"], lambda found: found["strings"]),
        (
            ["lens", "hi", "--layer", "0"],
            lambda found: [cell["token"] for cell in found["rows"] if cell["row"] == "0"],
        ),
    ],
)
def test_with_chat_the_text_is_a_user_message(capsys, chatting, command, read):
    code, out, err = run(capsys, *command, "--chat", "--model", chatting, "--json")
    assert (code, err) == (0, "")
    assert read(json.loads(out)) == ["<s>", *"user hi bot"]


def test_heads_are_scored_on_a_message(capsys, chatting, tmp_path):
    path = tmp_path / "x.safetensors"
    code, _, err = run(capsys, "heads", "--text", "hi", "--chat", "--model", chatting, "--out", path, "-q")
    assert (code, err) == (0, "")
    assert {tokens.numel() for tokens in HeadScores.load(path).tokens.values()} == {1 + len("user hi bot")}
