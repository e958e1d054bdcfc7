"""Every notebook runs from scratch and offline, and defines no functions."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

from tests.shared import ENGINE_IS_TOLD, needs_smollm2

ON_SMOLLM2 = ("real_model", "task_circuits")
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_defines_no_functions_and_has_pictures_of_its_figures(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            made = [
                n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, (ast.FunctionDef, ast.ClassDef))
            ]
            assert not made, f"{path.name} defines {made[0].name}"
            assert cell.execution_count, f"run docs/make_notebooks.py {path.name}"
            pictures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
            # HTML conversion and code hosts show only the picture
            assert pictures == ("mechlens.plot_" in cell.source), cell.source


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all notebooks, since each new one would import torch and the engine again."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(
        env=os.environ
        | {
            "HF_HUB_OFFLINE": "1",
            "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython")),
            "PYTHONWARNINGS": ENGINE_IS_TOLD,
            # plotly's renderer for notebooks that are read offline
            "PLOTLY_RENDERER": "notebook",
        }
    )
    yield manager
    manager.shutdown_kernel(now=True)


# pyzmq and jupyter_client, which run the kernel, warn about their own event loops
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=needs_smollm2 if path.stem in ON_SMOLLM2 else ())
        for path in NOTEBOOKS
    ],
)
def test_a_notebook_runs_from_scratch_and_shows_its_figures(path, kernel):
    notebook = nbformat.read(path, 4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    client = NotebookClient(notebook, timeout=300, km=kernel)
    try:
        client.execute()
    finally:
        client.kc.stop_channels()
    shown = 0
    for cell in notebook.cells[1:]:
        if cell.cell_type != "code":
            continue
        assert cell.outputs or cell.source.startswith("import"), f"nothing to see after: {cell.source}"
        for output in cell.outputs:
            assert output.output_type != "error"
            assert "Warning" not in output.get("text", ""), output.get("text")
            html = output.get("data", {}).get("text/html", "")
            # plotly requests MathJax even without formulas, and works without it
            fetched = [url for url in re.findall(r'src="(http[^"]*)"', html) if "mathjax" not in url.lower()]
            assert not fetched, "a figure that needs the network"
            shown += "Plotly.newPlot" in html or "CircuitsVis" in html
    plots = sum("mechlens.plot_" in cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert shown == plots > 0
