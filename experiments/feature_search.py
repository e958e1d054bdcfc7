"""What excites a model's features: the post "Language Model Features" as a script, with numbers and verdicts.

    python experiments/feature_search.py --model mechlens-books --out out/feature_search

Finds the tokens that most excite every feature of every layer, by complete, greedy and gradient search, asks
how often layers share them, and holds that against the same model with random weights, against random blocks
on the trained embeddings, and against chance. Prints each claim of the post beside its number. Then finds
real contexts for a few features: in `--corpus`, or in text that the model itself writes. Saves every result
(`.safetensors`), table (`.csv`) and figure (`.html`), and all figures on one page, `report.html`, which opens
without a network. `--model gpt2` is the post's own model, whose tables are then compared token by token; most
of its time goes into the greedy searches.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import mechlens
from mechlens.errors import ModelLoadError
from mechlens.show.feature_alignment import feature_alignment_section
from mechlens.show.features import (
    complete_search_section,
    feature_examples_section,
    gradient_search_section,
    greedy_search_section,
)
from mechlens.show.section import Section
from mechlens.studies.feature_search import FeatureStudy
from mechlens.text.display import visible_token

LAYERS = {
    "trained": "trained",
    "random": "random weights",
    "embeddings": "random blocks, trained embeddings",
}
MODELS = {
    "trained_random": "trained vs. random weights",
    "trained_embeddings": "trained vs. random blocks on its embeddings",
    "trained_other": "the model vs. the one of another size",
}
"""By name in the study, which has the last where another model was given."""
DRAWN = 4
"""Gradient searches in the report."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mechlens-books", help="bundled name, hub name or directory")
    parser.add_argument("--out", type=Path, default=Path("out/feature_search"), help="folder to write to")
    parser.add_argument("--features", type=int, default=32, help="how many are searched by gradients")
    parser.add_argument("--tokens", type=int, default=4, help="of greedy searches")
    parser.add_argument("--corpus", type=Path, help=".txt or .jsonl to find real contexts in, or a folder")
    parser.add_argument("--windows", type=int, default=64, help="how much of it to read, or to write")
    parser.add_argument("--against", help="a model of another size with the same tokenizer, to compare with")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and starts")
    parser.add_argument("--device", default=None)
    options = parser.parse_args()
    try:
        model = mechlens.load_model(options.model, device=options.device, processing=False)
        against = None
        if options.against is not None:
            against = mechlens.load_model(options.against, device=options.device, processing=False)
        corpus = options.corpus
        if corpus is None:
            corpus = mechlens.sample_tokens(model, batch=options.windows, seq_len=64, seed=options.seed)
        study = mechlens.reproduce_feature_search(
            model,
            n_features=options.features,
            n_tokens=options.tokens,
            corpus=corpus,
            limit=options.windows,
            against=against,
            seed=options.seed,
        )
        options.out.mkdir(parents=True, exist_ok=True)
    except (ModelLoadError, ValueError, OSError) as error:
        parser.error(str(error))

    print("claim | published | measured | what would do | verdict")
    for c in study.comparisons:
        bound = "" if c.low is None else f"at least {c.low}"
        print(f"{c.claim} | {c.published} | {c.measured} | {bound} | {c.verdict}")
    print_alignments(study)
    written = options.corpus is None
    print_contexts(study, "contexts that the model wrote" if written else "real contexts")

    saved = study.save(options.out)
    path = options.out / "features.csv"
    study.to_features().to_csv(path, index=False)
    saved.append(path)
    figures = {
        "tokens": mechlens.plot_feature_tokens(study.complete["trained"]),
        "alignment": mechlens.plot_feature_alignment(
            *[study.alignments[name] for name in LAYERS], names=list(LAYERS.values())
        ),
        "gradient": mechlens.plot_gradient_search(study.gradient[0]),
    }
    for name, figure in figures.items():
        path = options.out / f"{name}.html"
        figure.write_html(path, include_plotlyjs="directory")
        saved.append(path)
    page = mechlens.write_report(
        options.out / "report.html",
        *sections(study, "text that the model wrote" if written else "the corpus"),
        title="What excites a model's features",
        model=study.complete["trained"].model,
        comparisons=study.comparisons,
        command=shlex.join(["python", *sys.argv]),
    )
    print(f"\nwrote {len(saved) + 1} files to {options.out}; all figures are on {page}")


def print_alignments(study: FeatureStudy) -> None:
    """How often the same feature has the same best token."""
    print("\nShare of features with the same best token (95% interval), and what chance gives:")
    named = {name: f"layers, {words}" for name, words in LAYERS.items()} | models(study)
    for name, words in named.items():
        share = study.alignments[name].share()
        print(
            f"  {words:46} {share.value:.3f} ({share.low:.3f} to {share.high:.3f})   "
            f"chance {share.chance:.4f}   {share.verdict}"
        )


def models(study: FeatureStudy) -> dict[str, str]:
    """The comparisons of two models that there are."""
    return {name: words for name, words in MODELS.items() if name in study.alignments}


def print_contexts(study: FeatureStudy, contexts: str) -> None:
    """Each searched token beside what excites its feature most in a text."""
    found, search = study.examples, study.complete["trained"]
    assert found is not None
    print(f"\nSearched tokens beside the strongest of {found.read} {contexts}:")
    table = found.to_dataframe().query("rank == 1")
    for row in table.to_dict("records"):
        at = search.layers.index(row["layer"]), search.features.index(row["feature"])
        token = search.strings[str(int(search.ids[at][0]))]
        print(
            f"  layer {row['layer']} feature {row['feature']}: {visible_token(token)} "
            f"{float(search.activations[at][0]):.2f} alone; in text {visible_token(str(row['token']))} "
            f"{row['activation']:.2f}"
        )


def sections(study: FeatureStudy, corpus: str) -> list[Section]:
    """The report's chapters, in the order of the post."""
    assert study.examples is not None
    examples = study.examples
    return [
        complete_search_section(study.complete["trained"]),
        feature_alignment_section(
            [study.alignments[name] for name in LAYERS],
            names=list(LAYERS.values()),
            title="Do layers share their best tokens?",
        ),
        feature_alignment_section(
            [study.alignments[name] for name in models(study)],
            names=list(models(study).values()),
            title="Do other models have the same features?",
        ),
        greedy_search_section(study.greedy),
        gradient_search_section(study.gradient[:DRAWN]),
        gradient_search_section(study.repeated[:DRAWN], title="Several positions at once"),
        feature_examples_section(
            examples,
            [(layer, feature) for layer in examples.layers for feature in examples.features],
            text=f"Of {corpus}.",
        ),
    ]


if __name__ == "__main__":
    main()
