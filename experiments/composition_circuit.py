"""The article's induction circuit, built from two heads' weights, as a script with numbers and verdicts.

    python experiments/composition_circuit.py --model mechlens-books --out out/composition_circuit

Finds the previous-token heads that a model's induction heads work with, and prints what speaks for each pair:
how the two attend, K-composition and the accuracy of the composed circuit (over keys for each query and over
queries for each key, because the article does not say which; of GPT-2's pair over the whole vocabulary, of
others over at most 2048 tokens of it), and what is lost when the one head is ablated only as the other's keys
see it, and altogether. Beside it stands the article's figure, 0.2283 for 4.11 and 5.5 of GPT-2 small, which
is judged on `--model gpt2`. Saves every result (`.safetensors`), table (`.csv`) and figure (`.html`), and all
figures on one page, `report.html`, which opens without a network."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import mechlens
from mechlens.errors import ModelLoadError
from mechlens.results import NOT_JUDGED
from mechlens.show.induction_circuits import induction_circuits_section
from mechlens.show.section import Figure, Section
from mechlens.studies.induction_circuits import strongest
from mechlens.terminal import number, print_induction_circuits, tolerance


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mechlens-books", help="bundled name, hub name or directory")
    parser.add_argument(
        "--out", type=Path, default=Path("out/composition_circuit"), help="folder to write to"
    )
    parser.add_argument("--seq-len", type=int, default=50, help="random tokens in one copy")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--seed", type=int, default=0, help="of the sequences")
    parser.add_argument("--device", default=None)
    options = parser.parse_args()
    try:
        model = mechlens.load_model(options.model, device=options.device)
        study = mechlens.reproduce_composition_circuit(
            model,
            seq_len=options.seq_len,
            batch=options.batch,
            seed=options.seed,
        )
        options.out.mkdir(parents=True, exist_ok=True)
    except (ModelLoadError, ValueError, OSError) as error:
        parser.error(str(error))

    print("claim | published | measured | tolerance | verdict")
    for c in study.comparisons:
        print(f"{c.claim} | {c.published} | {number(c.measured)} | {tolerance(c.low, c.high)} | {c.verdict}")
    print()
    print_induction_circuits(study.circuits)

    written = study.save(options.out)
    figures = {
        "composition": mechlens.plot_composition_scores(study.composition),
        "graph": mechlens.plot_head_graph(study.composition),
    }
    at = strongest(study.circuits)
    if at is not None:
        later = study.circuits.pairs[at][2:]
        figures["eigenvalues"] = mechlens.plot_eigenvalues(mechlens.full_OV(model, later))
    for name, figure in figures.items():
        path = options.out / f"{name}.html"
        figure.write_html(path, include_plotlyjs="directory")
        written.append(path)
    captions = {
        "composition": "K-composition of every earlier with every later head, over chance.",
        "graph": "The strongest of them as a graph; layer 0 is at the bottom.",
        "eigenvalues": "Eigenvalues of the induction head's full OV circuit: positive ones copy.",
    }
    judged = any(c.verdict != NOT_JUDGED for c in study.comparisons)
    page = mechlens.write_report(
        options.out / "report.html",
        *[
            induction_circuits_section(study.circuits),
            Section(
                "Composition",
                "What each head could read of what earlier heads write, by the weights alone.",
                [Figure(figure, captions[name], captions[name]) for name, figure in figures.items()],
                {},
            ),
        ],
        comparisons=study.comparisons if judged else None,
        title="The induction circuit from weights",
        model=study.circuits.model,
        command=shlex.join(["python", *sys.argv]),
    )
    print(f"\nwrote {len(written) + 1} files to {options.out}; all figures are on {page}")


if __name__ == "__main__":
    main()
