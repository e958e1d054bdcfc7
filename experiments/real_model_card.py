"""Measure a language model's card: the figures that `mechlens reproduce` holds it against.

    python experiments/real_model_card.py --model smollm2-135m --into mechlens/studies/cards

Every figure is measured here and now, on draws that no reproduction makes by default. Writes MODEL.json, and
the whole results into --out. About twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import mechlens
from mechlens.published import Published
from mechlens.results import TunedLens, head_label
from mechlens.studies import findings
from mechlens.studies.facts import measure_facts
from mechlens.studies.findings import FeaturesStudy
from mechlens.studies.heads import Reproduction
from mechlens.studies.indirect_object import of_indirect_object, study_indirect_object
from mechlens.studies.logit_lens import LensStudy
from mechlens.studies.study import Measured, Study
from mechlens.text.display import visible_token

SEED = 1000
SEEDS = range(SEED, SEED + 5)
"""None that a reproduction draws by default: it must not be held against its own sequences."""
SOURCE = "the model's card"
N_PATCHED = 30
STEPS, STEP_TOKENS = 30, 256
"""Of the tuned lens."""
STRONGEST, AGAINST = 5, 2
"""Heads of the indirect object that are claimed."""


def of_heads(found: Reproduction) -> list[Published]:
    """How well copies are read, and the highest heads of three kinds."""
    sequences = found.performance.tokens.shape[0] * found.performance.tokens.shape[1]
    claims = [
        Published(name, mean, SOURCE, sequences=sequences, interval=(low, high))
        for name, (mean, low, high) in found.performance.estimates.items()
    ]
    for kind, count in (("induction_score", 5), ("previous_token_score", 3), ("prefix_matching_score", 1)):
        ranked = list(found.heads.ranked(kind))
        claims.append(Published("highest_head", head_label(*ranked[0][0]), SOURCE, kind=kind))
        claims += [
            Published(
                "score",
                score,
                SOURCE,
                head=head,
                kind=kind,
                sequences=sequences,
                interval=tuple(found.heads.intervals[kind][:, head[0], head[1]].tolist()),
            )
            for head, score in ranked[:count]
        ]
    return claims


def of_study(study: str, measured: dict[str, Measured]) -> list[Published]:
    return [
        Published(
            what,
            each.value,
            SOURCE,
            sequences=1 if each.samples is None else len(each.samples),
            interval=each.interval,
            study=study,
        )
        for what, each in measured.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="a name or path that load_model takes")
    parser.add_argument("--into", type=Path, required=True, help="folder of the card")
    parser.add_argument("--out", type=Path, default=Path("out/real_model"), help="folder of the results")
    parser.add_argument(
        "--only", nargs="*", default=list(SOURCES), choices=list(SOURCES), help="measure these anew"
    )
    parser.add_argument("--books", help="text to train a tuned lens on: about twenty minutes more")
    parser.add_argument("--held-out", help="text to measure it on")
    options = parser.parse_args()
    if options.books and not options.held_out:
        parser.error("--books needs --held-out, other text to measure the tuned lens on")
    card = options.into / f"{Path(options.model).stem}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Any] = (
        json.loads(card.read_text()) if card.is_file() else {"seed": SEED, "figures": [], "also": {}}
    )
    figures = {name: [each for each in whole["figures"] if each["study"] == name] for name in SOURCES}
    model = mechlens.load_model(options.model)
    for name in options.only:
        study, claims = SOURCES[name](model, options.model)
        study.save(options.out)
        figures[name] = [dataclasses.asdict(each) for each in claims]
        whole["figures"] = [each for of in figures.values() for each in of]
        if isinstance(study, FeaturesStudy):
            whole["also"]["feature-tokens"] = of_features(study)
        if isinstance(study, LensStudy):
            whole["also"] |= of_lens_study(study)
        card.write_text(json.dumps(whole, indent=1) + "\n")
        print(f"{name}: {len(claims)} figures", flush=True)
    if options.books:
        lens = mechlens.train_tuned_lens(
            model,
            options.books,
            steps=STEPS,
            batch_tokens=STEP_TOKENS,
            held_out=8,
            held_out_corpus=options.held_out,
            resume=options.out / "tuned_lens_training.safetensors",
        )
        lens.save(options.out / "tuned_lens.safetensors")
        whole["also"]["tuned-lens"] = of_tuned_lens(lens)
        card.write_text(json.dumps(whole, indent=1) + "\n")


def of_features(study: FeaturesStudy) -> list[tuple[int, int, str, float]]:
    """The first features of a middle layer, each with the token that excites it most."""
    search = study.search
    layer = search.layers[len(search.layers) // 2]
    table = search.to_dataframe().query(f"layer == {layer} and end == 'highest' and rank == 1")
    return [
        (layer, int(row["feature"]), visible_token(row["token"]), float(row["activation"]))
        for row in table.to_dict("records")[:8]
    ]


def of_lens_study(study: LensStudy) -> dict[str, Any]:
    """The post's claims, and what becomes of the input on prose: mean KL(input || layer), and the geometric
    mean of the input token's rank."""
    prose = study.prose
    read = prose.mask[:, list(prose.positions)].clone()
    read[:, 0] = False
    kl = prose.kl_input[:, read].mean(1)
    rank = 10 ** prose.rank["input"][:, read].log10().mean(1)
    half = len(prose.rows) // 2
    return {
        "logit-lens": [(each.claim, str(each.measured), each.verdict) for each in study.comparisons],
        "input": [
            (prose.rows[row], float(kl[row]), float(rank[row])) for row in (0, 1, half, len(prose.rows) - 1)
        ],
    }


def of_tuned_lens(lens: TunedLens) -> dict[str, Any]:
    """Every third row, and the last one that has a translator."""
    rows = list(zip(lens.rows, lens.kl_plain.tolist(), lens.kl_tuned.tolist(), strict=False))
    return {
        "steps": lens.steps,
        "tokens_per_step": STEP_TOKENS,
        "held_out": lens.held_out_tokens,
        "rows": [row for at, row in enumerate(rows) if at % 3 == 1 or at == len(rows) - 1],
    }


def heads(model: Any, name: str) -> tuple[Study, list[Published]]:
    found = mechlens.reproduce(model, seeds=SEEDS, figures=())
    return found, of_heads(found)


def facts(model: Any, name: str) -> tuple[Study, list[Published]]:
    study, measured = measure_facts(model)
    return study, of_study("facts", measured)


def induction_circuits(model: Any, name: str) -> tuple[Study, list[Published]]:
    """The three strongest induction heads, each with the three strongest previous-token heads before it."""
    scores = mechlens.score_heads(model, ["induction_score", "previous_token_score"], seeds=SEEDS[:1])
    later = [head for head, _ in list(scores.ranked("induction_score"))[:3]]
    earlier = [head for head, _ in list(scores.ranked("previous_token_score"))[:3]]
    pairs = [(one, other) for other in later for one in earlier if one[0] < other[0]]
    study, measured = findings.measure_circuits(model, pairs, seed=SEED)
    return study, of_study("induction-circuits", measured)


def indirect_object(model: Any, name: str) -> tuple[Study, list[Published]]:
    study = study_indirect_object(model, n_patched=N_PATCHED, seed=SEED)
    mean = study.heads.recovered
    order = mean.flatten().argsort(descending=True).tolist()
    wanted = [divmod(at, mean.shape[1]) for at in (*order[:STRONGEST], *order[-AGAINST:])]
    claims = of_study("indirect-object", of_indirect_object(study, wanted))
    by_label = {head_label(*head): head for head in wanted}
    return study, [dataclasses.replace(each, head=by_label.get(each.what)) for each in claims]


def features(model: Any, name: str) -> tuple[Study, list[Published]]:
    study, measured = findings.measure_features(mechlens.load_model(name, processing=False))
    return study, of_study("features", measured)


def logit_lens(model: Any, name: str) -> tuple[Study, list[Published]]:
    """What the original post claims, which is held against the post and not against the card."""
    return mechlens.reproduce_logit_lens(model, seed=SEED), []


SOURCES = {
    "heads": heads,
    "facts": facts,
    "induction-circuits": induction_circuits,
    "indirect-object": indirect_object,
    "features": features,
    "logit-lens": logit_lens,
}

if __name__ == "__main__":
    main()
