"""Put a trained model into the package, with a card of freshly measured figures.

    python experiments/model_card.py --run runs/bundled --into mechlens/models/bundled

`--run` is the `--out` of train_bundled_model.py. Copies weights and tokenizer, runs the study `heads`, and
writes `card.json` (which `mechlens reproduce` compares the model with) and `README.md` (for people).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

import mechlens
from mechlens.models.load.loading import BUNDLED
from mechlens.models.load.registry import ModelSummary, model_summary
from mechlens.results import head_label
from mechlens.studies.heads import DRAWS, HeadsStudy, study_heads
from mechlens.studies.published import Published

FILES = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
PROMPTS = ("It was a dark and stormy night, and", '"My dear," said', "The captain of the ship")
TEMPERATURE = 0.6
SEEDS = range(1000, 1005)
"""Different from the default seeds, so that no reproduction is compared with its own sequences."""
SOURCE = "the model's card"


def figures_of(found: HeadsStudy) -> list[Published]:
    """The thresholds that the model was made to pass, and its own figures."""
    sequences = found.repeated_tokens.tokens.shape[0] * found.repeated_tokens.tokens.shape[1]
    claims = [
        Published("at_most", "at most 0.01", SOURCE, kind="first_half_accuracy", threshold=0.01),
        Published("at_least", "at least 0.90", SOURCE, kind="second_half_accuracy", threshold=0.90),
        Published("induction_circuit", "yes", SOURCE),
    ]
    for name in ("first_half_log_prob", "second_half_log_prob", "second_half_accuracy"):
        claims.append(Published(name, found.repeated_tokens.estimates[name][0], SOURCE, sequences=sequences))
    for kind in ("induction_score", "previous_token_score", "prefix_matching_score", "copying_score"):
        head, score = next(found.head_scores.ranked(kind))
        claims.append(Published("score", score, SOURCE, head=head, kind=kind, sequences=sequences))
    return claims


def continuations(model: Any, seed: int = 0) -> list[str]:
    """One sampled continuation of 60 tokens per prompt, at a low temperature."""
    draw = torch.Generator().manual_seed(seed)
    texts = []
    for prompt in PROMPTS:
        tokens = mechlens.text_tokens(model, prompt)
        with torch.inference_mode():
            for _ in range(60):
                logits = model(tokens)[0, -1] / TEMPERATURE
                new = torch.multinomial(logits.softmax(-1), 1, generator=draw)
                tokens = torch.cat([tokens, new[None]], dim=1)
        texts.append(model.tokenizer.decode(tokens[0, 1:]))
    return texts


def card(summary: ModelSummary, training: dict[str, Any], found: HeadsStudy, texts: list[str]) -> str:
    recipe, estimates = training["recipe"], found.repeated_tokens.estimates
    heads, log = found.head_scores, training["log"]
    rows = []
    for kind in heads.kinds:
        for head, score in list(heads.ranked(kind))[:3]:
            low, high = (float(bound[head]) for bound in heads.intervals[kind])
            null = float(heads.null(kind)[head])
            rows.append(
                f"| {kind} | {head_label(*head)} | {score:.3f} | {low:.3f} to {high:.3f} | {null:.3f} |"
            )
    first = next((row for row in log if row["induction_score"] >= 0.5), None)
    when = (
        f"The induction score first passed 0.5 at step {first['step']:,}, "
        f"after {first['step'] * recipe['batch_tokens'] / 1e6:.1f} million tokens."
        if first
        else "The induction score did not pass 0.5."
    )
    quoted = "\n\n".join("> " + text.replace("\n", "\n> ") for text in texts)
    halves = "\n".join(
        f"| {name.replace('_', ' ')} | {mean:.3f} | {low:.3f} to {high:.3f} |"
        for name, (mean, low, high) in estimates.items()
    )
    million = recipe["steps"] * recipe["batch_tokens"] / 1e6
    return f"""# {BUNDLED}

A small English language model with induction heads, for learning and for tests. It ships with mechlens and
needs no network. The scores on this page were measured by `experiments/model_card.py`, the losses by the training script.

| property | value |
|---|---|
| architecture | {summary.architecture}: rotary positions on {summary.rotary_dim} of {summary.d_head} dimensions of each head, parallel blocks, untied embeddings |
| parameters | {summary.n_params:,}, in {summary.dtype} |
| layers, heads, d_model, d_mlp | {summary.n_layers}, {summary.n_heads}, {summary.d_model}, {summary.d_mlp} |
| vocabulary, context | {summary.d_vocab:,} (byte-level BPE), {summary.n_ctx} |

## Data

{training["train_tokens"]:,} tokens of English books first published in or before 1900, all in the public domain;
two whole books ({training["validation_tokens"]:,} tokens: *The Time Machine*, *Alice's Adventures in Wonderland*) were held out. The model also
saw *stories*: sequences of chunks, all cut at random places from a single sequence of random tokens (of text, in one
story out of five), so repeats occur at irregular distances.

## Recipe

`experiments/train_bundled_model.py`, seed {recipe["seed"]}: {recipe["steps"]:,} steps of {recipe["batch_tokens"]:,} tokens ({million:.1f} million in all), AdamW at {recipe["learning_rate"]}
with {recipe["warmup"]} steps of warm-up and a linear decay over the last {recipe["decay"]:.0%}, weight decay {recipe["weight_decay"]}, bfloat16 autocast. The context grew from 64 through 256 to {recipe["context"]}; the share of text grew from
{recipe["text_share"]:.0%} to {recipe["final_text_share"]:.0%}. {training["seconds"] / 60:.0f} minutes on two busy CPU cores. {when}

## Losses

| on the held-out books, nats per token | |
|---|---|
| this model | {training["validation_loss"]:.3f} |
| a bigram model with back-off, fitted to the same text | {training["bigram_loss"]:.3f} |

## Repeated random tokens

BOS, {found.repeated_tokens.seq_len} random tokens, and the same tokens again; {found.repeated_tokens.tokens.shape[0] * found.repeated_tokens.tokens.shape[1]} sequences (seeds {SEEDS[0]} to {SEEDS[-1]}). Log probabilities in nats.

| | mean | {found.repeated_tokens.confidence:.0%} interval |
|---|---|---|
{halves}

## Heads

The three highest heads for each score; `null` is the null baseline: the same score with its cause removed.

| score | head | mean | {heads.confidence:.0%} interval | null |
|---|---|---|---|---|
{chr(10).join(rows)}

## Samples

Sampled at temperature {TEMPERATURE}, seed 0, not cherry-picked:

{quoted}

## Limits

It knows the English of old novels and how to copy. It does not answer questions, and its statements of fact are noise. The books
reflect the views of their time. The stories were made to train induction heads, so the strength of these heads tells nothing about
how easily they form in models trained only on text.

## License

MIT, like mechlens. The books are in the public domain.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="the trained model's folder")
    parser.add_argument("--into", type=Path, required=True, help="the package's folder for it")
    given = parser.parse_args()
    training = json.loads((given.run / "training.json").read_text())
    if "validation_loss" not in training:
        parser.error(f"{given.run} is not trained to its end: run train_bundled_model.py again")
    if given.run.resolve() != given.into.resolve():
        for name in FILES:
            shutil.copyfile(given.run / name, given.into / name)
    model = mechlens.load_model(str(given.into.resolve()))
    found = study_heads(model, dataclasses.replace(DRAWS, seeds=SEEDS))
    figures = [dataclasses.asdict(figure) for figure in figures_of(found)]
    kept = {name: training[name] for name in ("recipe", "validation_loss", "bigram_loss", "seconds")}
    text = json.dumps({"seeds": list(SEEDS), "figures": figures, "training": kept}, indent=1) + "\n"
    (given.into / "card.json").write_text(text, encoding="utf-8")
    page = card(model_summary(given.into), training, found, continuations(model))
    (given.into / "README.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
