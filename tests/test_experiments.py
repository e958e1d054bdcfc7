"""Experiment scripts, as a user runs them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from mechlens.published import COMPOSITION_GPT2, FEATURES, LOGIT_LENS, MLP_PATCHING
from mechlens.results import CompleteSearch, InductionCircuits, LogitLensResult, PatchGridResult, load

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXPERIMENTS / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_the_post_as_a_script_prints_each_claim_and_draws_each_figure(tmp_path):
    ran = run("logit_lens.py", "--no-training", "--out", tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    claims = [line for line in ran.stdout.splitlines() if line.endswith(("reproduced", "not judged"))]
    assert len(claims) == len(LOGIT_LENS)
    assert "Eiffel" in ran.stdout
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


def test_mlp_patching_prints_its_verdicts_and_draws_its_figures(tmp_path):
    ran = run("mlp_patching.py", "--seq-len", 8, "--batch", 2, "--out", tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    claims = [line for line in ran.stdout.splitlines() if line.endswith(("reproduced", "not judged"))]
    assert len(claims) == len(MLP_PATCHING)
    assert "rank correlation of the change with induction_score" in ran.stdout
    grid = load(tmp_path / "out" / "as_written.safetensors")
    assert isinstance(grid, PatchGridResult)
    assert grid.positions == tuple(range(8, 16))
    page = (tmp_path / "out" / "report.html").read_text()
    figures = {path.stem for path in (tmp_path / "out").glob("*.html")} - {"report"}
    assert figures == {"aligned", "as_written", "heads", "head_effects"}
    # and two kinds of scores, each with its nulls
    assert page.count('class="plot"') == len(figures) + 4


def test_the_composition_circuit_prints_its_evidence_and_draws_its_figures(tmp_path):
    ran = run("composition_circuit.py", "--seq-len", 20, "--batch", 2, "--out", tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    claims = [line for line in ran.stdout.splitlines() if line.endswith("not judged")]
    assert len(claims) == len(COMPOSITION_GPT2), "another model is held against nothing"
    assert "L1H2 and L3H5: attends as a circuit does" in ran.stdout
    found = load(tmp_path / "out" / "circuits.safetensors")
    assert isinstance(found, InductionCircuits)
    assert found.verdicts[0] == "circuit"
    page = (tmp_path / "out" / "report.html").read_text()
    figures = {path.stem for path in (tmp_path / "out").glob("*.html")} - {"report"}
    assert figures == {"composition", "graph", "eigenvalues"}
    assert page.count('class="plot"') == len(figures)


def test_feature_search_prints_its_verdicts_and_draws_its_figures(tmp_path):
    options = ("--features", 2, "--tokens", 2, "--windows", 3, "--against", "mechlens-books")
    ran = run("feature_search.py", *options, "--out", tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    claims = [line for line in ran.stdout.splitlines() if line.endswith(("reproduced", "not judged"))]
    assert len(claims) == len(FEATURES), "the post's tables are of other models"
    assert "layers, random blocks, trained embeddings" in ran.stdout
    # with itself
    assert re.search("the model vs. the one of another size +1.000", ran.stdout)
    assert "strongest of 3 contexts that the model wrote" in ran.stdout
    found = load(tmp_path / "out" / "complete_trained.safetensors")
    assert isinstance(found, CompleteSearch)
    assert found.ids.shape == (4, 192, 5)
    assert len((tmp_path / "out" / "features.csv").read_text().splitlines()) == 3
    page = (tmp_path / "out" / "report.html").read_text()
    figures = {path.stem for path in (tmp_path / "out").glob("*.html")} - {"report"}
    assert figures == {"tokens", "alignment", "gradient"}
    # best tokens; two alignments, each with its overlap; two gradient searches
    assert page.count('class="plot"') == 7
    assert page.count('class="view"') == 8


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    ran = run("logit_lens.py", "--model", "./nowhere", "--out", tmp_path)
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    assert "nowhere" in ran.stderr.splitlines()[-1]
