"""Run the notebooks and store their outputs with a picture of every figure; needs `chromium` on the path.

    python docs/make_notebooks.py [NOTEBOOK]...

JupyterLab draws a figure from its data, which is kept unless it is large. Code hosts and HTML conversion show
the picture.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import plotly.graph_objects as go
from make_pictures import screenshot
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
MOST_DATA = 100_000
"""The most characters of a figure's data that a notebook keeps."""
VIEW_SIZE = (900, 520)
"""Width and height of an interactive view, in pixels."""


def kept(data: dict[str, Any], target: Path) -> dict[str, Any]:
    """An output as stored: a figure gets a picture, an interactive view is replaced by one."""
    if PLOTLY in data:
        figure = go.Figure(data[PLOTLY]["data"], data[PLOTLY]["layout"])
        width, height = figure.layout.width or 700, figure.layout.height or 450
        bare = {"displayModeBar": False}
        screenshot(figure.to_html(include_plotlyjs=True, config=bare), target, width + 20, height + 20)
        if len(json.dumps(data[PLOTLY])) > MOST_DATA:
            data = {"text/plain": "a figure: run the cell to explore it"}
    elif "CircuitsVis" in data.get("text/html", ""):
        screenshot(data["text/html"], target, *VIEW_SIZE)
        data = {"text/plain": data.get("text/plain", "an interactive view: run the cell to use it")}
    else:
        return data
    return data | {"image/png": base64.b64encode(target.read_bytes()).decode()}


def run(path: Path) -> None:
    notebook = nbformat.read(path, 4)
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    with tempfile.TemporaryDirectory() as folder:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if "outputs" in cell:
                # drop finished progress bars
                cell.outputs = [each for each in cell.outputs if WIDGET not in each.get("data", {})]
            for output in cell.get("outputs", ()):
                if "data" in output:
                    output["data"] = kept(output["data"], Path(folder) / "figure.png")
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    for each in map(Path, sys.argv[1:] or sorted(NOTEBOOKS.glob("*.ipynb"))):
        run(each)
