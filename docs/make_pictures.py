"""Make the pictures for the README and docs/; needs `chromium` on the path.

    python docs/make_pictures.py [--results out/real_model]

`--results` is the `--out` of experiments/real_model_card.py; without it, only the bundled model is drawn.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

import mechlens

DOCS = Path(__file__).parent


def screenshot(page: str, target: Path, width: int, height: int) -> None:
    """Save a page as a PNG file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        options += ["--disable-background-networking", f"--user-data-dir={folder}/profile"]
        options += ["--virtual-time-budget=5000", "--force-device-scale-factor=1.25"]
        options += [f"--window-size={width},{height}"]
        target.parent.mkdir(exist_ok=True)
        subprocess.run(
            ["chromium", *options, f"--screenshot={target}", file.as_uri()], check=True, capture_output=True
        )


def picture(target: Path, figures: Sequence[go.Figure]) -> None:
    """Draw figures side by side."""
    parts: list[str] = []
    for figure in figures:
        # the JavaScript once, with the first figure
        bare = {"displayModeBar": False}
        parts.append(figure.to_html(full_html=False, include_plotlyjs=not parts, config=bare))
    width = 20 + sum(figure.layout.width for figure in figures)
    height = 20 + max(figure.layout.height for figure in figures)
    style = "body{margin:10px;display:flex;align-items:start;background:white}"
    page = f"<meta charset=utf-8><style>{style}</style>{''.join(parts)}"
    screenshot(page, target, width, height)
    print(target)


def of_bundled_model() -> None:
    model = mechlens.load_model("mechlens-books")
    performance = mechlens.repeated_token_performance(model)
    scores = mechlens.score_heads(model, kinds="induction_score")
    figures = (mechlens.plot_log_probs(performance), mechlens.plot_head_scores(scores, "induction_score"))
    for width, figure in zip((760, 500), figures, strict=True):
        figure.update_layout(width=width, height=450)
    picture(DOCS / "induction_heads.png", figures)


def of_real_model(results: Path) -> None:
    folder = DOCS / "smollm2-135m"
    model = mechlens.load_model("smollm2-135m")
    lens = mechlens.logit_lens(model, "The Eiffel Tower is in the city of", targets=[" Paris"])
    saved = {path.stem: mechlens.load(path) for path in results.glob("*.safetensors")}
    scores = saved["head_scores"]
    induction = mechlens.plot_head_scores(scores, "induction_score")
    picture(folder / "first.png", (mechlens.plot_logit_lens(lens, "rank_ Paris"), induction))
    picture(folder / "facts.png", (mechlens.plot_facts(saved["facts"]),))
    picture(folder / "heads.png", (induction, mechlens.plot_head_scores(scores, "previous_token_score")))
    for name, file in (
        ("indirect_object", "indirect_object_heads"),
        ("positions", "indirect_object_positions"),
    ):
        figure = mechlens.plot_patch_grid(saved[file], value="recovered")
        picture(folder / f"{name}.png", (figure,))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, help="folder with the results of experiments/real_model_card.py"
    )
    options = parser.parse_args()
    of_bundled_model()
    if options.results is not None:
        of_real_model(options.results)


if __name__ == "__main__":
    main()
