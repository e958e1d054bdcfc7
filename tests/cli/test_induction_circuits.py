"""`mechlens induction-circuits`, run in this process."""

from __future__ import annotations

import csv
import json
import re

import pytest

from mechlens.analyses.circuits.induction import find_induction_circuits
from mechlens.results import InductionCircuits, load
from mechlens.show.section import section
from mechlens.text.prompts import RepeatedTokens
from tests.cli.commands import run

SMALL = ("--batch", "2", "--seq-len", "20", "--pair", "1.2,3.5")


def test_a_pair_is_printed_and_saved(capsys, tmp_path, bundled):
    path = tmp_path / "found.safetensors"
    code, out, err = run(capsys, "induction-circuits", *SMALL, "--out", path)
    assert (code, err) == (0, f"mechlens: wrote {path}\n")
    found = load(path)
    assert isinstance(found, InductionCircuits)
    expected = find_induction_circuits(
        bundled, RepeatedTokens(20, batch=2, seeds=[0]), pairs=[("1.2", "3.5")]
    )
    assert found.verdicts == expected.verdicts
    score = expected.evidence(0)["induction_score"]
    assert found.evidence(0)["induction_score"] == pytest.approx(score, abs=1e-6)
    assert "L1H2 and L3H5: behavior: yes" in out
    code, out, _ = run(capsys, "induction-circuits", *SMALL, "--json", "--out", tmp_path / "page.html")
    assert code == 0
    (pair,) = json.loads(out)["rows"]
    assert (pair["previous"], pair["induction"]) == ("L1H2", "L3H5")
    assert (str(pair["k_rank"]), str(pair["n_earlier"])) == ("1", "18"), "whole numbers"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "mechlens induction-circuits --pair 1.2,3.5 --seq-len 20 --batch 2" in page
    assert f"{score:.3f}" in page
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert cells[:2] == ["L1H2", "L3H5"]
    # a rank is a count, and one decimal is enough for standard deviations
    assert cells[4:6] == [f"{pair['k_z']:.1f}", "1"]
    code, _, _ = run(capsys, "induction-circuits", *SMALL, "--quiet", "--out", tmp_path / "found.csv")
    assert code == 0
    (listed,) = csv.DictReader((tmp_path / "found.csv").read_text().splitlines())
    assert (listed["k_rank"], listed["n_earlier"]) == ("1", "18")


def test_the_tables_are_no_wider_than_the_page(bundled):
    found = find_induction_circuits(bundled, RepeatedTokens(20, batch=2, seeds=[0]), pairs=[("1.2", "3.5")])
    # measured in Chromium: a letter in the widest common font takes 9.1 pixels on average, and columns are
    # 24 apart; a window of 1200 leaves 1120
    for table in section(found).parts:
        assert sum(9.1 * len(name) + 24 for name in table.headings) < 1120


def test_a_model_without_pairs_says_why(capsys):
    code, out, _ = run(capsys, "induction-circuits", "--threshold", "0.99", "--batch", "2")
    assert code == 0
    assert "No pair was found: no head has an induction score of at least 0.99" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--how", "half"], "--how must be one of mean, resample, zero"),
        (["--pair", "1.2"], "--pair must be two heads with a comma"),
        (["--pair", "a,b"], "a head is written L5H5"),
        (["--pair", "3.5,1.2"], "L3H5"),
        (["--out", "x.png"], "--out must be a .html, .csv or .safetensors file"),
        (["--threshold", "2"], "less than or equal to 1"),
        (["--bogus"], "No such option: --bogus"),
    ],
)
def test_a_wrong_argument_gives_one_line_and_exit_code_2(capsys, arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "induction-circuits", *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert not out
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"
