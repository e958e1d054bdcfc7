"""Make the README's picture from the bundled model: needs Chromium, as `chromium` on the path.

python docs/make_picture.py
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import mechlens

SIZE = (1280, 470)


def main() -> None:
    model = mechlens.load_model("mechlens-books")
    performance = mechlens.repeated_token_performance(model)
    scores = mechlens.score_heads(model, ["induction_score"])
    figures = (mechlens.plot_log_probs(performance), mechlens.plot_head_scores(scores, "induction_score"))
    parts = []
    for width, figure in zip((760, 500), figures, strict=True):
        figure.update_layout(width=width, height=SIZE[1] - 20)
        # the JavaScript once, with the first figure
        bare = {"displayModeBar": False}
        parts.append(figure.to_html(full_html=False, include_plotlyjs=not parts, config=bare))
    style = "body{margin:10px;display:flex;background:white}"
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(f"<meta charset=utf-8><style>{style}</style>{''.join(parts)}", encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        options += ["--disable-background-networking", f"--user-data-dir={folder}/profile"]
        options += ["--virtual-time-budget=5000", "--force-device-scale-factor=1.5"]
        options += [f"--window-size={SIZE[0]},{SIZE[1]}"]
        target = Path(__file__).parent / "induction_heads.png"
        subprocess.run(
            ["chromium", *options, f"--screenshot={target}", page.as_uri()], check=True, capture_output=True
        )
    print(target)


if __name__ == "__main__":
    main()
