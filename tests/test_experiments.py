"""Experiment scripts, as a user runs them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from mechlens.published import COMPOSITION_GPT2, FEATURES, LOGIT_LENS, MLP_PATCHING
from mechlens.results import CompleteSearch, InductionCircuits, LogitLensResult, PatchGridResult, load

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script with arguments; gives its exit code and what it printed and complained of."""

    def run(name, *arguments):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(sys, "argv", [str(EXPERIMENTS / name), *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(EXPERIMENTS / name), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


def test_the_post_as_a_script_prints_each_claim_and_draws_each_figure(run, tmp_path):
    code, out, err = run("logit_lens.py", "--no-training", "--out", tmp_path / "out")
    assert code == 0, err
    claims = [line for line in out.splitlines() if line.endswith(("reproduced", "not judged"))]
    assert len(claims) == len(LOGIT_LENS)
    assert "Eiffel" in out
    prose = load(tmp_path / "out" / "prose.safetensors")
    assert isinstance(prose, LogitLensResult)
    assert not prose.mask.all(), "two texts of unequal length"
    page = (tmp_path / "out" / "report.html").read_text()
    figures = {path.stem for path in (tmp_path / "out").glob("*.html")} - {"report"}
    assert figures == {
        *("prose_probability", "prose_rank", "prose_kl", "prose_lines", "input_rank", "copying"),
        *("copying_first", "copying_lines", "repetition", "sub_blocks", "eiffel", "logit_variance"),
    }
    assert page.count('class="plot"') == len(figures)


def test_mlp_patching_prints_its_verdicts_and_draws_its_figures(run, tmp_path):
    code, out, err = run("mlp_patching.py", "--seq-len", 8, "--batch", 2, "--out", tmp_path / "out")
    assert code == 0, err
    claims = [line for line in out.splitlines() if line.endswith(("reproduced", "not judged"))]
    assert len(claims) == len(MLP_PATCHING)
    assert "rank correlation of the change with induction_score" in out
    grid = load(tmp_path / "out" / "as_written.safetensors")
    assert isinstance(grid, PatchGridResult)
    assert grid.positions == tuple(range(8, 16))
    page = (tmp_path / "out" / "report.html").read_text()
    figures = {path.stem for path in (tmp_path / "out").glob("*.html")} - {"report"}
    assert figures == {"aligned", "as_written", "heads", "head_effects"}
    # and two kinds of scores, each with its nulls
    assert page.count('class="plot"') == len(figures) + 4


def test_the_composition_circuit_prints_its_evidence_and_draws_its_figures(run, tmp_path):
    code, out, err = run("composition_circuit.py", "--seq-len", 20, "--batch", 2, "--out", tmp_path / "out")
    assert code == 0, err
    claims = [line for line in out.splitlines() if line.endswith("not judged")]
    assert len(claims) == len(COMPOSITION_GPT2), "another model is held against nothing"
    assert "L1H2 and L3H5: attends as a circuit does" in out
    found = load(tmp_path / "out" / "circuits.safetensors")
    assert isinstance(found, InductionCircuits)
    assert found.verdicts[0] == "circuit"
    page = (tmp_path / "out" / "report.html").read_text()
    figures = {path.stem for path in (tmp_path / "out").glob("*.html")} - {"report"}
    assert figures == {"composition", "graph", "eigenvalues"}
    assert page.count('class="plot"') == len(figures)


def test_feature_search_prints_its_verdicts_and_draws_its_figures(run, tmp_path, directories_with_room):
    model = directories_with_room / "gpt2"
    options = ("--model", model, "--features", 2, "--tokens", 2, "--windows", 3, "--against", model)
    code, out, err = run("feature_search.py", *options, "--out", tmp_path / "out")
    assert code == 0, err
    claims = [line for line in out.splitlines() if line.endswith(("reproduced", "not judged"))]
    assert len(claims) == len(FEATURES), "the post's tables are of other models"
    assert "layers, random blocks, trained embeddings" in out
    # with itself
    assert re.search("the model vs. the one of another size +1.000", out)
    assert "strongest of 3 contexts that the model wrote" in out
    found = load(tmp_path / "out" / "complete_trained.safetensors")
    assert isinstance(found, CompleteSearch)
    assert found.ids.shape == (2, 32, 5)
    assert len((tmp_path / "out" / "features.csv").read_text().splitlines()) == 3
    page = (tmp_path / "out" / "report.html").read_text()
    figures = {path.stem for path in (tmp_path / "out").glob("*.html")} - {"report"}
    assert figures == {"tokens", "alignment", "gradient"}
    # best tokens; two alignments, each with its overlap; two gradient searches
    assert page.count('class="plot"') == 7
    assert page.count('class="view"') == 8


def test_a_model_that_is_not_there_is_one_line(run, tmp_path):
    code, _, err = run("logit_lens.py", "--model", "./nowhere", "--out", tmp_path)
    assert code == 2
    assert "Traceback" not in err
    assert "nowhere" in err.splitlines()[-1]
