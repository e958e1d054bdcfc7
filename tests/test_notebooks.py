"""Every notebook runs from a clean kernel without a network, and defines no functions."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.shared import ENGINE_IS_TOLD

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_defines_no_functions_and_ships_without_outputs(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            made = [
                n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))
            ]
            assert not made, f"{path.name} defines {made[0].name}"
            assert not cell.outputs


# pyzmq and jupyter_client, which run the kernel, warn about their own event loops
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_a_clean_kernel_and_shows_its_figures(path, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONWARNINGS", ENGINE_IS_TOLD)
    # plotly's own choice for a notebook whose reader may have no network
    monkeypatch.setenv("PLOTLY_RENDERER", "notebook")
    notebook = nbformat.read(path, 4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        assert cell.outputs or cell.source.startswith("import"), f"nothing to see after: {cell.source}"
        for output in cell.outputs:
            assert output.output_type != "error"
            assert "Warning" not in output.get("text", ""), output.get("text")
            html = output.get("data", {}).get("text/html", "")
            # plotly asks for MathJax, whether or not there is a formula, and draws without it
            fetched = [url for url in re.findall(r'src="(http[^"]*)"', html) if "mathjax" not in url.lower()]
            assert not fetched, "a figure that needs the network"
            shown += "Plotly.newPlot" in html or "CircuitsVis" in html
    plots = sum("mechlens.plot_" in cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert shown == plots > 0
