"""Measure a language model's card: the figures that `mechlens reproduce` compares it with.

    python experiments/real_model_card.py --model smollm2-135m --into mechlens/studies/cards

Every figure is measured on draws that no reproduction uses by default. Writes MODEL.json, and the results
into --out. Takes about twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mechlens
from mechlens.models.protocol import describe
from mechlens.results import TunedLens, head_label
from mechlens.studies.circuits import study_induction_circuits
from mechlens.studies.claims import Study
from mechlens.studies.facts import study_facts
from mechlens.studies.features import FeaturesStudy, study_features
from mechlens.studies.heads import DRAWS, HeadsStudy, study_heads
from mechlens.studies.indirect_object import study_indirect_object
from mechlens.studies.ioi import study_ioi
from mechlens.studies.logit_lens import LensStudy, study_logit_lens
from mechlens.studies.published import Published
from mechlens.studies.reproduce import Reproduction
from mechlens.text.display import visible_token

SEED = 1000
SEEDS = range(SEED, SEED + 5)
"""Different from the default seeds, so that no reproduction is compared with its own sequences."""
SOURCE = "the model's card"
N_PATCHED = 30
STEPS, STEP_TOKENS = 30, 256
"""Training of the tuned lens."""
STRONGEST, AGAINST = 5, 2
"""Numbers of indirect-object heads in the card: the strongest, and those that work against the answer."""


def of_heads(found: HeadsStudy) -> list[Published]:
    """Repeated-token performance, and the highest heads of three kinds."""
    sequences = found.repeated_tokens.tokens.shape[0] * found.repeated_tokens.tokens.shape[1]
    claims = [
        Published(name, mean, SOURCE, sequences=sequences, interval=(low, high))
        for name, (mean, low, high) in found.repeated_tokens.estimates.items()
    ]
    for kind, count in (("induction_score", 5), ("previous_token_score", 3), ("prefix_matching_score", 1)):
        ranked = list(found.head_scores.ranked(kind))
        claims.append(Published("highest_head", head_label(*ranked[0][0]), SOURCE, kind=kind))
        claims += [
            Published(
                "score",
                score,
                SOURCE,
                head=head,
                kind=kind,
                sequences=sequences,
                interval=tuple(found.head_scores.intervals[kind][:, head[0], head[1]].tolist()),
            )
            for head, score in ranked[:count]
        ]
    return claims


def of_study(name: str, study: Study, wanted: Mapping[str, tuple[int, int]] | None = None) -> list[Published]:
    """All quantities of a study.

    Args:
        wanted: keep only these single-head quantities, by label.
    """
    return [
        Published(
            what,
            each.value,
            SOURCE,
            sequences=1 if each.samples is None else len(each.samples),
            interval=each.interval,
            study=name,
            head=(wanted or {}).get(what),
        )
        for what, each in study.quantities().items()
        if wanted is None or what in wanted or not re.fullmatch(r"L\d+H\d+", what)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="a name or path for load_model")
    parser.add_argument("--into", type=Path, required=True, help="folder of the card")
    parser.add_argument("--out", type=Path, default=Path("out/real_model"), help="folder of the results")
    parser.add_argument(
        "--only", nargs="*", default=list(SOURCES), choices=list(SOURCES), help="remeasure only these"
    )
    parser.add_argument("--books", help="text to train a tuned lens on: takes about twenty minutes more")
    parser.add_argument("--held-out", help="text to evaluate it on")
    options = parser.parse_args()
    if options.books and not options.held_out:
        parser.error("--books needs --held-out, other text to evaluate the tuned lens on")
    card = options.into / f"{Path(options.model).stem}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Any] = (
        json.loads(card.read_text()) if card.is_file() else {"seed": SEED, "figures": [], "also": {}}
    )
    figures = {name: [each for each in whole["figures"] if each["study"] == name] for name in SOURCES}
    model = mechlens.load_model(options.model)
    model_info = describe(model)
    for name in options.only:
        study, claims = SOURCES[name](model, options.model)
        Reproduction(model_info, {name: study}).save(options.out)
        figures[name] = [dataclasses.asdict(each) for each in claims]
        whole["figures"] = [each for of in figures.values() for each in of]
        if isinstance(study, FeaturesStudy):
            whole["also"]["feature-tokens"] = of_features(study)
        if isinstance(study, LensStudy):
            whole["also"] |= of_lens_study(study)
        card.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{name}: {len(claims)} figures", flush=True)
    if options.books:
        lens = mechlens.train_tuned_lens(
            model,
            options.books,
            training=mechlens.Training(steps=STEPS, batch_tokens=STEP_TOKENS),
            held_out=8,
            held_out_corpus=options.held_out,
            resume=options.out / "tuned_lens_training.safetensors",
        )
        lens.save(options.out / "tuned_lens.safetensors")
        whole["also"]["tuned-lens"] = of_tuned_lens(lens)
        card.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def of_features(study: FeaturesStudy) -> list[tuple[int, int, str, float]]:
    """The first features of a middle layer, each with its maximally activating token."""
    search = study.features
    layer = search.layers[len(search.layers) // 2]
    table = search.to_dataframe().query(f"layer == {layer} and end == 'highest' and rank == 1")
    return [
        (layer, int(row["feature"]), visible_token(row["token"]), float(row["activation"]))
        for row in table.to_dict("records")[:8]
    ]


def of_lens_study(study: LensStudy) -> dict[str, Any]:
    """The logit-lens claims, and the traces of the input in prose: mean KL(input || layer) and the geometric
    mean of the input token's rank."""
    prose = study.prose
    read = prose.mask[:, list(prose.positions)].clone()
    read[:, 0] = False
    kl = prose.kl_input[:, read].mean(1)
    rank = 10 ** prose.rank["input"][:, read].log10().mean(1)
    half = len(prose.rows) // 2
    return {
        "logit-lens": [(each.claim, each.row[2], each.verdict) for each in study.comparisons],
        "input": [
            (prose.rows[row], float(kl[row]), float(rank[row])) for row in (0, 1, half, len(prose.rows) - 1)
        ],
    }


def of_tuned_lens(lens: TunedLens) -> dict[str, Any]:
    """Every third row, and the last one with a translator."""
    rows = list(zip(lens.rows, lens.kl_plain.tolist(), lens.kl_tuned.tolist(), strict=False))
    return {
        "steps": lens.steps,
        "tokens_per_step": STEP_TOKENS,
        "held_out": lens.held_out_tokens,
        "rows": [row for at, row in enumerate(rows) if at % 3 == 1 or at == len(rows) - 1],
    }


def heads(model: Any, name: str) -> tuple[Study, list[Published]]:
    found = study_heads(model, dataclasses.replace(DRAWS, seeds=SEEDS))
    return found, of_heads(found)


def facts(model: Any, name: str) -> tuple[Study, list[Published]]:
    study = study_facts(model)
    return study, of_study("facts", study)


def induction_circuits(model: Any, name: str) -> tuple[Study, list[Published]]:
    """The three strongest induction heads, each with the three strongest previous-token heads of earlier
    layers."""
    scores = mechlens.score_heads(
        model, mechlens.RepeatedTokens(seeds=SEEDS[:1]), ["induction_score", "previous_token_score"]
    )
    later = [head for head, _ in list(scores.ranked("induction_score"))[:3]]
    earlier = [head for head, _ in list(scores.ranked("previous_token_score"))[:3]]
    pairs = [(one, other) for other in later for one in earlier if one[0] < other[0]]
    study = study_induction_circuits(model, pairs=pairs, seed=SEED)
    return study, of_study("induction-circuits", study)


def indirect_object(model: Any, name: str) -> tuple[Study, list[Published]]:
    """The heads that recover most, and those that work most against the answer."""
    study = study_indirect_object(model, n_patched=N_PATCHED, seed=SEED)
    mean = study.indirect_object_heads.recovered
    order = mean.flatten().argsort(descending=True).tolist()
    wanted = [divmod(at, mean.shape[1]) for at in (*order[:STRONGEST], *order[-AGAINST:])]
    return study, of_study("indirect-object", study, {head_label(*head): head for head in wanted})


def ioi(model: Any, name: str) -> tuple[Study, list[Published]]:
    study = study_ioi(model, seed=SEED)
    return study, of_study("ioi", study)


def features(model: Any, name: str) -> tuple[Study, list[Published]]:
    study = study_features(mechlens.load_model(name, processing=False))
    return study, of_study("features", study)


def logit_lens(model: Any, name: str) -> tuple[Study, list[Published]]:
    """The logit-lens claims, which are not compared with the card."""
    return study_logit_lens(model, seed=SEED), []


SOURCES = {
    "heads": heads,
    "facts": facts,
    "induction-circuits": induction_circuits,
    "indirect-object": indirect_object,
    "ioi": ioi,
    "features": features,
    "logit-lens": logit_lens,
}

if __name__ == "__main__":
    main()
