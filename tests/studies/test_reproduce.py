"""Studies by name, in Python and on the command line."""

from __future__ import annotations

import dataclasses
import json
import re

import pandas as pd
import pytest

import mechlens
from mechlens.models.load.loading import BUNDLED, load_model
from mechlens.results import load
from mechlens.studies import STUDIES
from mechlens.studies.published import CARDS, figures_of
from mechlens.studies.reproduce import planned
from mechlens.text.prompts import RepeatedTokens
from tests import examples
from tests.cli.commands import run

SMALL = RepeatedTokens(seq_len=10, batch=1, seeds=[0])


def test_every_figure_on_a_card_belongs_to_a_study_and_has_a_value():
    for card in CARDS.glob("*.json"):
        figures = json.loads(card.read_text())["figures"]
        assert {each["study"] for each in figures} <= set(STUDIES)
        assert all(each["what"] and each["value"] == each["value"] for each in figures)


def test_by_default_the_studies_of_the_card_are_planned():
    smollm2 = dataclasses.replace(
        examples.model(),
        name="smollm2-135m",
        n_layers=30,
        n_heads=9,
        d_model=576,
        d_vocab=49152,
        revision=None,
    )
    with_card = {each.study for each in figures_of(smollm2)}
    assert with_card == {"heads", "facts", "induction-circuits", "indirect-object", "ioi", "features"}
    assert planned(smollm2) == [name for name in STUDIES if name in with_card]
    assert planned(examples.model()) == ["heads"]
    assert planned(smollm2, ["features", "heads"]) == ["heads", "features"]
    with pytest.raises(ValueError, match=r"names must be among heads, logit-lens.*, got 'head'"):
        planned(smollm2, ["head"])


def test_features_need_unprocessed_weights_before_anything_runs(bundled, monkeypatch):
    monkeypatch.setattr("mechlens.studies.reproduce.study_heads", None)
    with pytest.raises(
        ValueError, match="raw must be a function that loads unprocessed weights, for features, got"
    ):
        mechlens.reproduce(bundled, "heads", "features")
    raw = load_model(BUNDLED, processing=False)
    assert list(mechlens.reproduce(raw, "features", progress=False).studies) == ["features"]


def test_a_reproduction_has_the_comparisons_results_and_sections_of_its_studies(bundled, tmp_path):
    found = mechlens.reproduce(bundled, "composition", "heads", heads=SMALL, progress=False)
    assert list(found.studies) == ["heads", "composition"]
    assert found.comparisons == (), "nothing is published for these"
    for study in found.studies.values():
        assert set(study.results) <= set(found.results)
    assert len(found.sections()) == sum(len(study.sections()) for study in found.studies.values())
    written = found.save(tmp_path / "deep" / "er", command="mechlens x")
    assert {path.name for path in written} == {
        *(f"{name}.{ending}" for name in found.results for ending in ("safetensors", "csv")),
        "comparison.csv",
        "report.html",
    }
    for name, result in found.results.items():
        assert load(tmp_path / "deep" / "er" / f"{name}.safetensors") == result
    assert "mechlens x" in written[-1].read_text()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("logit-lens", {"reproduced": 6, "not reproduced": 1}),
        ("mlp-patching", {"reproduced": 2, "not reproduced": 1}),
        ("composition", {}),
        ("induction-circuits", {}),
        ("features", {}),
    ],
)
def test_the_command_prints_and_writes_the_verdicts_of_a_study(capsys, name, expected, tmp_path):
    code, out, err = run(capsys, "reproduce", name, "--out", tmp_path)
    assert code == 0, err
    verdicts = pd.read_csv(tmp_path / "comparison.csv").verdict
    assert verdicts.value_counts().to_dict() == expected
    cells = re.findall(r"│ (reproduced|not reproduced|not judged) +│", out)
    assert cells == list(verdicts)
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r"</span> ((?:not )?(?:reproduced|judged))</span>", page) == list(verdicts)


def test_an_impossible_study_is_refused_in_one_line(capsys, tmp_path):
    for arguments, message in (
        (["facts"], "the target ' Paris' is 3 tokens, not one"),
        (["fact"], "STUDY must be one of heads, logit-lens"),
        (["--model", "./nowhere"], "nowhere"),
    ):
        code, _, err = run(capsys, "reproduce", *arguments, "--out", tmp_path / "out")
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert message in err
