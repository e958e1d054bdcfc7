"""Write docs/smollm2-135m.md from the card of smollm2-135m, which has every figure on the page.

python experiments/real_model_page.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mechlens.results import head_label
from mechlens.show.markdown import table_markdown
from mechlens.show.section import Table
from mechlens.studies.published import CARDS

CARD = CARDS / "smollm2-135m.json"
PAGE = Path(__file__).parents[1] / "docs" / "smollm2-135m.md"
TEXT = Path(__file__).with_suffix(".md")
"""The page as a template: names of figures in place of the figures."""

_LENS = (
    "What nostalgebraist saw in GPT-2, as numbers: on prose, copied rare words and repeated sentences "
    "(`mechlens reproduce logit-lens`). As in GPT-2, the unembedding is tied to the embedding."
)
_INPUT = (
    "Because the embedding is tied, the lens at the embedding predicts the input token: its rank is "
    "{rank:.1f} there (geometric mean over prose), {first[1]:.0f} after layer 0, {half[1]:.0f} halfway and "
    "{last[1]:.0f} after the last layer. KL(input ‖ layer) is {first[0]:.1f} nats after layer 0, "
    "{half[0]:.1f} halfway and {last[0]:.1f} after the last layer. The input is gone after one layer, as "
    "nostalgebraist found, but rare tokens are not kept better than common ones."
)
_TUNED = (
    "Trained on public-domain books, {steps} steps of {tokens_per_step:,} tokens. KL(final ‖ layer) on "
    "{held_out:,} held-out tokens, in nats:"
)


def page(card: dict[str, Any]) -> str:
    """The page of a card."""
    figures = {
        study: [each for each in card["figures"] if each["study"] == study]
        for study in ("heads", "facts", "induction-circuits", "indirect-object", "ioi", "features")
    }
    facts, circuits, task, ioi, features = (
        {each["what"]: each["value"] for each in figures[study]}
        for study in ("facts", "induction-circuits", "indirect-object", "ioi", "features")
    )
    estimates = {each["what"]: each["value"] for each in figures["heads"] if each["kind"] is None}
    scores = [each for each in figures["heads"] if each["what"] == "score"]
    patched = [each for each in figures["indirect-object"] if each["head"]]
    prompts = next(each for each in figures["indirect-object"] if each["what"] == "logit_diff")
    return TEXT.read_text(encoding="utf-8").format(
        Paris=facts["Paris"],
        Paris_without=facts["Paris without BOS"],
        Paris_first=facts["Paris first"],
        Paris_first_without=facts["Paris first without BOS"],
        facts=_facts_table(facts),
        **estimates,
        sequences=scores[0]["sequences"],
        heads=_table(
            ("head", "score", "mean (95% interval)"),
            [
                (head_label(*each["head"]), each["kind"].replace("_", " "), _with_interval(each, 3))
                for each in scores
            ],
        ),
        circuits=_circuits_table(circuits),
        circuit_words=_circuit_words(circuits),
        n_prompts=prompts["sequences"],
        logit_diff=task["logit_diff"],
        right=task["right"],
        first=task["first"],
        null=task["null"],
        n_patched=patched[0]["sequences"],
        indirect_object=_table(
            ("head", "share of the logit difference (95% interval)"),
            [
                (each["what"], _with_interval(each, 2))
                for each in sorted(patched, key=lambda each: -each["value"])
            ],
        ),
        leaves=task["leaves S2"],
        arrives=task["arrives at END"],
        faithfulness=ioi["faithfulness"],
        left=abs(round(ioi["left"], 2)),
        overlap=ioi["overlap"],
        trained=features["trained"],
        random=features["random"],
        chance=features["chance"],
        more=features["more than random"].capitalize(),
        also=_also(card.get("also", {})),
    )


def _facts_table(facts: dict[str, Any]) -> str:
    rows = (
        ("answers that are the top-1 prediction", "known", "{:.0%}"),
        ("wrong answers of the same relation that are the top-1 prediction", "known null", "{:.0%}"),
        ("mean probability of the answer", "probability", "{:.2f}"),
        ("first layer from which half are in the top 10", "half in top 10", "{:.0f}"),
        ("first layer from which half are the top-1 prediction", "half first", "{:.0f}"),
    )
    return _table(
        ("", "with BOS", "without BOS"),
        [
            (words, form.format(facts[name]), form.format(facts[f"{name} without BOS"]))
            for words, name, form in rows
        ],
    )


def _with_interval(figure: dict[str, Any], digits: int) -> str:
    low, high = figure["interval"]
    return f"{figure['value']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _pairs(circuits: dict[str, Any]) -> list[tuple[str, str]]:
    return [(words[1], words[2]) for words in map(str.split, circuits) if words[0] == "verdict"]


def _circuits_table(circuits: dict[str, Any]) -> str:
    return _table(
        (
            "previous-token head",
            "induction head",
            "rank in K-composition",
            "induction score",
            "with it ablated in the keys",
            "verdict",
        ),
        [
            (
                one,
                other,
                f"{circuits[f'K rank {one} {other}']:.0f}",
                f"{circuits[f'score {other}']:.2f}",
                f"{circuits[f'ablated {one} {other}']:.2f}",
                circuits[f"verdict {one} {other}"],
            )
            for one, other in _pairs(circuits)
        ],
    )


def _circuit_words(circuits: dict[str, Any]) -> str:
    together = [pair for pair in _pairs(circuits) if circuits["verdict {} {}".format(*pair)] == "circuit"]
    users = ", ".join(other for _, other in together)
    earlier = dict.fromkeys(one for one, _ in _pairs(circuits))
    idle = [one for one in earlier if one not in {one for one, _ in together}]
    words = f"{', '.join(dict.fromkeys(one for one, _ in together))} forms a circuit with {users}."
    if idle:
        words += (
            f" {' and '.join(idle)} attend to the previous token almost as sharply, but ablating them "
            "changes little: an attention score does not show what a head is for."
        )
    return words


def _also(also: dict[str, Any]) -> str:
    """Sections not compared with the card: feature tokens, logit-lens claims, a tuned lens."""
    parts = []
    if "feature-tokens" in also:
        table = _table(
            ("layer", "feature", "token", "activation"),
            [
                (str(layer), str(feature), f"`{token}`", f"{activation:.1f}")
                for layer, feature, token, activation in also["feature-tokens"]
            ],
        )
        parts.append(f"\nMaximally activating tokens of some features, each token on its own:\n\n{table}\n")
    if "logit-lens" in also:
        table = _table(("claim", "measured", "verdict"), [tuple(each) for each in also["logit-lens"]])
        (_, kl, rank), (_, *first), (_, *half), (_, *last) = also["input"]
        kept = _INPUT.format(kl=kl, rank=rank, first=first, half=half, last=last)
        parts.append(f"\n## The claims of the logit-lens post\n\n{_LENS}\n\n{table}\n\n{kept}\n")
    if "tuned-lens" in also:
        lens = also["tuned-lens"]
        table = _table(
            ("after layer", "logit lens", "tuned lens"),
            [(row, f"{plain:.2f}", f"{tuned:.2f}") for row, plain, tuned in lens["rows"]],
        )
        parts.append(f"\n## A tuned lens\n\n{_TUNED.format(**lens)}\n\n{table}\n")
    return "".join(parts)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return table_markdown(Table(columns, rows, ""))


def main() -> None:
    PAGE.write_text(page(json.loads(CARD.read_text(encoding="utf-8"))), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
