"""`mechlens circuit` and `mechlens composition`: their output, files and errors."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shlex

import pandas as pd
import pytest

from mechlens.analyses.circuits.composition import (
    composition_scores,
    k_composition_circuit,
    q_composition_circuit,
    v_composition_circuit,
)
from mechlens.analyses.circuits.ov import full_OV
from mechlens.analyses.circuits.qk import full_QK
from mechlens.analyses.circuits.tokens import circuit_corner, largest_pairs
from mechlens.results import Circuit, CompositionScores
from tests.cli.commands import refused, run
from tests.close import assert_same


@pytest.mark.parametrize("command", ["circuit", "composition"])
def test_help_has_an_example_and_the_common_options(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"Example: mechlens {command}" in out
    for option in ("--json", "--quiet", "--device", "--dtype", "--revision", "--out", "--top"):
        assert option in out, f"{command} has no {option}"


BEFORE_LOADING = [
    (["circuit"], "Missing argument"),
    (["circuit", "5-5"], "a head is written L5H5, 5.5 or (5, 5), got '5-5'"),
    (["circuit", "1.2", "3.5", "--kind", "both"], "--kind must be one of ov, qk, k, q, v, got 'both'"),
    (["circuit", "1.2", "--kind", "k"], "--kind k takes an earlier and a later head, got 1"),
    (["circuit", "1.2", "3.5", "--kind", "qk"], "--kind qk takes one head, got 2"),
    (["circuit", "3.5", "1.2"], "must be in an earlier layer than the second, got L3H5 and L1H2"),
    (["circuit", "1.2", "1.3"], "must be in an earlier layer than the second"),
    (["circuit", "1.2", "--embedding", "W_U"], "--embedding must be one of W_E, effective, got 'W_U'"),
    (["circuit", "1.2", "3.5", "--rotary", "all"], "--rotary must be unrotated, got 'all'"),
    (
        ["circuit", "1.2", "3.5", "--rotary", "unrotated", "--relative-position", "1"],
        "give --relative-position or --rotary, not both",
    ),
    (["circuit", "1.2", "--rotary", "unrotated"], "--rotary is for queries and keys, and --kind is ov"),
    (["circuit", "1.2", "3.5", "--kind", "v", "--relative-position", "1"], "and --kind is v: leave it out"),
    (["circuit", "1.2", "--out", "x.png"], "--out must be a .html, .csv or .safetensors file"),
    (["circuit", "1.2", "--out", "no/such/x.csv"], "does not exist"),
    (["circuit", "1.2", "--top", "0"], "Invalid value for '--top'"),
    (["composition", "--kind", "ov"], "--kind must be one of k, q, v, got 'ov'"),
    (["composition", "--kind", "v", "--relative-position", "1"], "and --kind is v: leave it out"),
    (["composition", "--draws", "1"], "Invalid value for '--draws'"),
    (["composition", "--out", "x.pickle"], "--out must be a .html, .csv or .safetensors file"),
]
AFTER_LOADING = [
    (["circuit", "9.0"], "head L9H0 is out of range"),
    (["circuit", "1.2", "3.5", "--relative-position", "512"], "between 0 and 511"),
    (["circuit", "1.2", "--tokens", ""], "the text is empty"),
    (["composition", "--relative-position", "512"], "between 0 and 511"),
]


@pytest.mark.parametrize(("arguments", "message"), BEFORE_LOADING)
def test_a_wrong_argument_is_refused_before_the_model_is_loaded(
    capsys, arguments, message, monkeypatch, tmp_path
):
    # loading this missing model would fail first
    refused(capsys, [*arguments, "--model", "./nowhere"], message, monkeypatch, tmp_path)


@pytest.mark.parametrize(("arguments", "message"), AFTER_LOADING)
def test_heads_that_the_model_lacks_are_refused(capsys, arguments, message, monkeypatch, tmp_path):
    refused(capsys, arguments, message, monkeypatch, tmp_path)


def test_a_fully_rotated_model_has_no_default(capsys, monkeypatch, tmp_path, tiny_directories):
    model = ["--model", tiny_directories / "llama"]
    message = "this model rotates all 8 dimensions of its heads"
    refused(capsys, ["circuit", "0.0", "1.0", *model], message, monkeypatch, tmp_path)
    code, out, _ = run(capsys, "circuit", "0.0", "1.0", "--relative-position", 1, *model)
    assert code == 0
    assert "each key 1 before its query" in out


def saved(capsys, tmp_path, *arguments) -> Circuit:
    path = tmp_path / "x.safetensors"
    code, out, err = run(capsys, "circuit", *arguments, "--out", path, "--quiet")
    assert (code, out, err) == (0, "", "")
    found = Circuit.load(path)
    return Circuit(**{field.name: getattr(found, field.name) for field in dataclasses.fields(Circuit)})


def test_every_option_of_circuit_reaches_the_analysis(capsys, tmp_path, bundled):
    pair, part = ("L1H2", "3.5"), {"rotary": "unrotated"}
    assert_same(saved(capsys, tmp_path, *pair), k_composition_circuit(bundled, *pair, **part))
    assert_same(
        saved(capsys, tmp_path, *pair, "--kind", "q", "--rotary", "unrotated"),
        q_composition_circuit(bundled, *pair, **part),
    )
    assert_same(
        saved(capsys, tmp_path, *pair, "--kind", "v", "--embedding", "effective"),
        v_composition_circuit(bundled, *pair, embedding="effective"),
    )
    assert_same(
        saved(capsys, tmp_path, *pair, "--relative-position", 3),
        k_composition_circuit(bundled, *pair, relative_position=3),
    )
    assert saved(capsys, tmp_path, "3.5") == full_OV(bundled, "3.5")
    assert saved(capsys, tmp_path, *pair, "--kind", "ov") == full_OV(bundled, pair)
    assert saved(capsys, tmp_path, "3.5", "--kind", "qk") == full_QK(bundled, "3.5", **part)


def test_a_model_without_rotation_needs_no_choice(capsys, tiny_directories):
    code, out, err = run(capsys, "circuit", "0.0", "1.0", "--model", tiny_directories / "gpt2")
    assert (code, err) == (0, "")
    assert "rotat" not in out


def test_a_circuit_is_printed_in_both_orientations(capsys, bundled):
    code, out, _ = run(capsys, "circuit", "1.2", "3.5", "--top", 3)
    assert code == 0
    found = k_composition_circuit(bundled, "1.2", "3.5", rotary="unrotated")
    for name, axis in (("key for each query", "key"), ("query for each key", "query")):
        (line,) = [line for line in out.splitlines() if name in line]
        shown = re.findall(r"\d\.\d+", line)
        assert shown == [f"{found.top_k_accuracy(k, axis):.4f}" for k in (1, 5)]
    assert f"Matching score {found.copying_score():.3f}" in out, (
        "a circuit of queries and keys copies nothing"
    )
    assert "only the dimensions that are not rotated" in out
    entries = [f"{value:.3f}" for value in found.largest(4)["value"]]
    assert [entry in out for entry in entries] == [True, True, True, False]


def test_a_part_shows_the_largest_tokens_or_those_of_a_text(capsys, bundled):
    code, out, _ = run(capsys, "circuit", "3.5", "--tokens", " the captain of the", "--json")
    assert code == 0
    found = json.loads(out)
    # each token once
    words = [" the", " c", "aptain", " of"]
    assert found["corner"]["source"] == found["corner"]["destination"] == words
    expected = circuit_corner(bundled, full_OV(bundled, "3.5"), words)
    # JSON has every digit of a float32
    assert_same(found["corner"]["entries"], expected.to_numpy().tolist())
    _, out, _ = run(capsys, "circuit", "3.5", "--json", "--top", "5")
    found = json.loads(out)
    assert found["corner"]["source"][:2] == [found["rows"][0]["source"], found["rows"][0]["destination"]]
    assert len(found["corner"]["source"]) <= 8
    assert len(found["rows"]) == 5
    assert found["accuracy"]["destination"]["top_5"] == pytest.approx(
        full_OV(bundled, "3.5").top_k_accuracy(5)
    )
    assert (found["rotary"], found["axes"]) == ("none", ["source", "destination"])


def test_the_page_of_a_circuit_has_the_command_that_wrote_it(capsys, tmp_path):
    path = tmp_path / "x.html"
    arguments = ["--kind", "q", "--tokens", " the sea", "--top", "4", "--relative-position", "2"]
    arguments += ["--out", str(path), "L1H2", "L3H5"]
    code, _, err = run(capsys, "circuit", *arguments, "--quiet")
    assert (code, err) == (0, "")
    page = path.read_text()
    command = html.unescape(re.search(r"mechlens circuit [^<]*", page)[0])
    assert sorted(shlex.split(command)[2:]) == sorted(arguments)
    assert page.count('class="plot"') == 2
    assert "Q-composition of L1H2 with L3H5" in page


def test_the_largest_entries_are_saved_as_a_table(capsys, tmp_path, bundled):
    path = tmp_path / "x.csv"
    code, _, _ = run(capsys, "circuit", "3.5", "--top", 7, "--out", path, "--quiet")
    assert code == 0
    table = pd.read_csv(path, keep_default_na=False)
    expected = largest_pairs(bundled, full_OV(bundled, "3.5"), 7)
    assert table["source_id"].tolist() == expected["source_id"].tolist()
    assert table["value"].tolist() == pytest.approx(expected["value"].tolist())


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--kind", "q", "--seed", 3, "--draws", 5], {"kind": "q", "seed": 3, "draws": 5}),
        (["--kind", "v"], {"kind": "v"}),
        (["--relative-position", 2], {"kind": "k", "relative_position": 2}),
    ],
)
def test_every_option_of_composition_reaches_the_analysis(capsys, tmp_path, bundled, arguments, options):
    path = tmp_path / "x.safetensors"
    code, out, err = run(capsys, "composition", *arguments, "--out", path, "--quiet")
    assert (code, out, err) == (0, "", "")
    assert_same(CompositionScores.load(path), composition_scores(bundled, **options))


def test_composition_lists_the_highest_pairs_and_json_has_all(capsys, bundled):
    code, out, _ = run(capsys, "composition", "--top", 3)
    assert code == 0
    expected = composition_scores(bundled, "k").to_dataframe()
    rows = re.findall(r"│ (L\dH\d) *│ (L\dH\d) *│ *([\d.]+) │ *([+\d.]+) │ *([+\d.]+)", out)
    assert rows == [
        (
            row["earlier"],
            row["later"],
            f"{row['score']:.3f}",
            f"{row['over_baseline']:+.3f}",
            f"{row['z']:+.1f}",
        )
        for row in expected.head(3).to_dict("records")
    ]
    assert "queries and keys without their rotation" in out
    _, out, _ = run(capsys, "composition", "--json")
    found = json.loads(out)
    # 6 pairs of layers of 6 heads
    assert len(found["rows"]) == 6 * 36
    assert_same(found["rows"][0]["score"], expected["score"][0])
    assert found["rotary"] == "ignored"


def test_the_page_of_composition_has_a_heatmap_and_a_graph(capsys, tmp_path):
    path = tmp_path / "x.html"
    arguments = ["--kind", "v", "--top", "6", "--draws", "9", "--out", str(path)]
    code, _, err = run(capsys, "composition", *arguments, "--quiet")
    assert (code, err) == (0, "")
    page = path.read_text()
    command = html.unescape(re.search(r"mechlens composition [^<]*", page)[0])
    assert sorted(shlex.split(command)[2:]) == sorted(arguments)
    assert page.count('class="plot"') == 2
    assert "The 6 pairs with the highest scores" in page
