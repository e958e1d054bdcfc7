"""The article "How one can Interpret GPT2-Small" as a script: repeated tokens, and the heads behind them.

    python experiments/induction_heads.py --model mechlens-books --out out/induction_heads

Prints each claim of the article as a measured number, and saves every result (`.safetensors`), table
(`.csv`) and figure (`.html`, opens without a network). `--model gpt2` is the article's own model: its
published figures are then printed beside the measured ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mechlens
from mechlens.analyses.heads import detect_heads
from mechlens.errors import ModelLoadError
from mechlens.results import head_label


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mechlens-books", help="bundled name, hub name or directory")
    parser.add_argument("--out", type=Path, default=Path("out/induction_heads"), help="folder to write to")
    parser.add_argument("--seq-len", type=int, default=50, help="random tokens in one copy")
    parser.add_argument("--batch", type=int, default=30, help="sequences per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--device", default=None)
    options = parser.parse_args()
    try:
        model = mechlens.load_model(options.model, device=options.device)
        found = mechlens.reproduce(
            model,
            seq_len=options.seq_len,
            batch=options.batch,
            seeds=options.seeds,
        )
        options.out.mkdir(parents=True, exist_ok=True)
    except (ModelLoadError, ValueError, OSError) as error:
        parser.error(str(error))

    n = options.seq_len
    print(f"{found.heads.model.name}, BOS: {found.heads.prepend_bos}, {n} random tokens + the same again\n")
    print("1. The model does much better on the second copy.")
    for name, (mean, low, high) in found.performance.estimates.items():
        print(f"   {name:24} {mean:8.3f}   ({low:.3f} to {high:.3f})")
    print("\n2. Induction heads attend to the token after the earlier copy.")
    for (layer, head), score in list(found.heads.ranked("induction_score"))[:5]:
        diagonal = float(found.heads.mean("induction_diagonal_score")[layer, head])
        null = float(found.heads.null("induction_score")[layer, head])
        print(
            f"   {head_label(layer, head):6} {score:.3f}   whole diagonal, as in the article {diagonal:.3f}"
            f"   null {null:.3f}"
        )
    by_prefix = detect_heads(found.heads, "prefix_matching_score", 0.35)
    print(f"   by prefix matching >= 0.35 (25 tokens x 4): {' '.join(by_prefix) or 'none'}")
    print("\n3. Previous-token heads attend one back.")
    for (layer, head), score in list(found.heads.ranked("previous_token_score"))[:5]:
        print(f"   {head_label(layer, head):6} {score:.3f}")
    if found.comparisons:
        print("\nclaim | published | measured | tolerance | verdict")
        for c in found.comparisons:
            within = "" if c.low is None else f"{c.low:.3f} to {c.high:.3f}"
            published, measured = (
                value if isinstance(value, str) else f"{value:.3f}" for value in (c.published, c.measured)
            )
            print(f"{c.claim} | {published} | {measured} | {within} | {c.verdict}")

    written = found.save(options.out)
    figures = {
        "log_probs": mechlens.plot_log_probs(found.performance),
        "induction_heads": mechlens.plot_head_scores(found.heads, "induction_score"),
        "previous_token_heads": mechlens.plot_head_scores(found.heads, "previous_token_score"),
        "induction_nulls": mechlens.plot_scores_against_nulls(found.heads, "induction_score"),
    }
    for index, shown in enumerate(found.patterns.heads):
        name = f"attention_{head_label(*shown)}"
        figures[name] = mechlens.plot_attention_heatmap(found.patterns, index)
    for name, figure in figures.items():
        path = options.out / f"{name}.html"
        figure.write_html(path, include_plotlyjs="directory")
        written.append(path)
    print(f"\nwrote {len(written)} files to {options.out}")


if __name__ == "__main__":
    main()
