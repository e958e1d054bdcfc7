"""The article's question "How do MLP layers attribute?" as a script, with numbers and verdicts.

    python experiments/mlp_patching.py --model mechlens-books --out out/mlp_patching

Replaces each MLP's output at each position of the second copy of random tokens by that of the first copy, as
the article's loop is written and with the copies aligned, and prints whether its claim holds: no large
difference of the loss except at the first token. Then takes each attention head away and says whether
induction heads show by effect as well as by pattern. Saves every result (`.safetensors`), table (`.csv`) and
figure (`.html`), and all figures on one page, `report.html`, which opens without a network. `--model gpt2` is
the article's own model.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import mechlens
from mechlens.errors import ModelLoadError
from mechlens.results import head_label
from mechlens.show.heads import head_scores_section
from mechlens.show.patching import patching_section
from mechlens.studies.mlp_patching import INDUCTION, PREVIOUS, MlpStudy, first_and_others

SHOWN = 8
"""Heads that are listed."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mechlens-books", help="bundled name, hub name or directory")
    parser.add_argument("--out", type=Path, default=Path("out/mlp_patching"), help="folder to write to")
    parser.add_argument("--seq-len", type=int, default=50, help="random tokens in one copy")
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--seed", type=int, default=0, help="of the sequences")
    parser.add_argument("--how", default="mean", help="what is in a head's place: mean, zero or resample")
    parser.add_argument("--device", default=None)
    options = parser.parse_args()
    try:
        model = mechlens.load_model(options.model, device=options.device)
        study = mechlens.reproduce_mlp_patching(
            model,
            seq_len=options.seq_len,
            batch=options.batch,
            seed=options.seed,
            how=options.how,
        )
        options.out.mkdir(parents=True, exist_ok=True)
    except (ModelLoadError, ValueError, OSError) as error:
        parser.error(str(error))

    print(f"{study.aligned.model.name}, BOS: {study.aligned.prepend_bos}, {options.batch} sequences of")
    print(f"{options.seq_len} random tokens + the same again\n")
    print("claim | published | measured | what would do | verdict")
    for c in study.comparisons:
        measured = c.measured if isinstance(c.measured, str) else "nothing"
        bound = f"at least {c.low}" if c.low is not None else f"at most {c.high}"
        print(f"{c.claim} | {c.published} | {measured} | {bound} | {c.verdict}")
    print("\nLargest |change of loss| by patching one MLP output, nats:")
    for name, grid in (("as the loop is written", study.as_written), ("copies aligned", study.aligned)):
        first, others = first_and_others(grid)
        clean = float(grid.clean.mean())
        print(f"  {name:24} first position {first:.3f}   others {others:.3f}   clean loss {clean:.3f}")
    print_heads(study)

    written = study.save(options.out)
    figures = {
        "aligned": mechlens.plot_patch_grid(study.aligned),
        "as_written": mechlens.plot_patch_grid(study.as_written),
        "heads": mechlens.plot_patch_grid(study.heads),
        "head_effects": mechlens.plot_head_effects(study.heads),
    }
    for name, figure in figures.items():
        path = options.out / f"{name}.html"
        figure.write_html(path, include_plotlyjs="directory")
        written.append(path)
    page = mechlens.write_report(
        options.out / "report.html",
        patching_section(
            study.as_written,
            title="MLP outputs from the first half, as the loop is written",
            text="The loop starts at position seq_len. Counted with BOS, that is the last token of "
            "the first copy, and it gets what the MLP gives at BOS.",
        ),
        patching_section(
            study.aligned,
            title="MLP outputs from the first copy, aligned",
            text="Each position of the second copy gets the MLP's output at the same token of the first.",
        ),
        patching_section(study.heads, title="Heads taken away"),
        head_scores_section(study.scores),
        title="How do MLP layers contribute?",
        model=study.aligned.model,
        comparisons=study.comparisons,
        command=shlex.join(["python", *sys.argv]),
    )
    print(f"\nwrote {len(written) + 1} files to {options.out}; all figures are on {page}")


def print_heads(study: MlpStudy) -> None:
    """The heads that cost most, beside what their patterns say."""
    heads = study.heads
    print(f"\nTaking a head away ({heads.source}): change of loss in nats, and the head's scores")
    effect, error = heads.effect, heads.standard_error
    for at in effect.flatten().argsort(descending=True)[:SHOWN].tolist():
        layer, head = divmod(at, effect.shape[1])
        scores = [float(study.scores.mean(kind)[layer, head]) for kind in (INDUCTION, PREVIOUS)]
        print(
            f"  {head_label(layer, head):6} {float(effect[layer, head]):+.3f} "
            f"(standard error {float(error[layer, head]):.3f})   induction {scores[0]:.3f}   "
            f"previous token {scores[1]:.3f}"
        )
    for kind in (INDUCTION, PREVIOUS):
        print(f"rank correlation of the change with {kind}: {study.rank_correlation(kind):.2f}")


if __name__ == "__main__":
    main()
