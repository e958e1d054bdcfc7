"""The study `facts`: what a language model knows, and at which layer the logit lens shows it.

References: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mechlens.analyses.logit_lens import logit_lens
from mechlens.arguments import check_model
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel, describe
from mechlens.results import Facts
from mechlens.show.section import Section, section
from mechlens.studies.claims import Measured, Study
from mechlens.text.prompts import text_tokens
from mechlens.text.task_library import CAPITALS
from mechlens.text.tokens import target_id

Fact = tuple[str, str, str]
"""Relation, prompt and answer; the answer begins with a space."""

_LANDMARKS = {
    "The Eiffel Tower": "Paris",
    "The Colosseum": "Rome",
    "Big Ben": "London",
    "The Brandenburg Gate": "Berlin",
    "The Kremlin": "Moscow",
    "The Golden Gate Bridge": "San",
    "The Statue of Liberty": "New",
    "The Parthenon": "Athens",
    "The Sydney Opera House": "Sydney",
    "The Forbidden City": "Beijing",
}
_LANGUAGES = {
    "France": "French",
    "Italy": "Italian",
    "Germany": "German",
    "Spain": "Spanish",
    "Japan": "Japanese",
    "Russia": "Russian",
    "Brazil": "Portuguese",
    "Egypt": "Arabic",
    "Mexico": "Spanish",
    "Austria": "German",
}
_OPPOSITES = {
    "hot": "cold",
    "large": "small",
    "day": "night",
    "up": "down",
    "left": "right",
    "black": "white",
    "old": "young",
    "true": "false",
}
_NAMES = {
    "The author of Romeo and Juliet is William": "Shakespeare",
    "The first president of the United States was George": "Washington",
    "The theory of relativity was developed by Albert": "Einstein",
    "The theory of evolution was proposed by Charles": "Darwin",
}
_SCIENCE = {
    "The chemical symbol of oxygen is": "O",
    "The Earth revolves around the": "Sun",
    "The number of days in a week is": "seven",
    "Water is made of hydrogen and": "oxygen",
}


def _facts(relation: str, template: str, answers: Mapping[str, str]) -> list[Fact]:
    return [(relation, template.format(about), f" {answer}") for about, answer in answers.items()]


FACTS: tuple[Fact, ...] = (
    *_facts("city of a landmark", "{} is in the city of", _LANDMARKS),
    *_facts("capital of a country", "The capital of {} is the city of", CAPITALS),
    *_facts("language of a country", "The official language of {} is", _LANGUAGES),
    *_facts("opposite of a word", "The opposite of {} is", _OPPOSITES),
    *_facts("surname", "{}", _NAMES),
    *_facts("science", "{}", _SCIENCE),
)
"""48 facts, chosen before any of them was tried. None was removed afterwards."""
EIFFEL = "The Eiffel Tower is in the city of"


def read_facts(model: LensModel, facts: Sequence[Fact] = FACTS, *, prepend_bos: bool | None = None) -> Facts:
    """Read the answer to each fact off every layer with the logit lens.

    Args:
        facts: (relation, prompt, answer). The answer is one token, with its leading space. Each relation
            needs two different answers, because the answer to another fact is the null baseline.
        prepend_bos: None prepends BOS where the tokenizer has one.

    Returns:
        Rank and log-probability (nats) of each answer, and of a wrong answer of the same relation, at the
        embedding and after every layer.

    Raises:
        ValueError: no facts, an answer that is not one token of this model, a relation with one answer.

    Example:
        >>> facts = [("verb", "The captain of the", " ship"), ("verb", "He went to the", " door")]
        >>> found = mechlens.read_facts(model, facts)
        >>> found.share(top=10).shape  # of the facts, at the embedding and after each of 4 layers
        torch.Size([5])

    References: nostalgebraist 2020, "interpreting GPT: the logit lens".
    Cost: one forward pass for each length of prompt, and one product with `W_U` for each fact and layer.
    """
    check_model(model)
    if not facts:
        raise ArgumentError("facts", "at least one (relation, prompt, answer)", facts)
    others = _other_answers(facts)
    tokens = [text_tokens(model, prompt, prepend_bos=prepend_bos) for _, prompt, _ in facts]
    by_length: dict[int, list[int]] = defaultdict(list)
    for at, ids in enumerate(tokens):
        by_length[ids.shape[1]].append(at)
    n_rows = model.cfg.n_layers + 1
    found = {
        f"{kind} {name}": torch.zeros(len(facts), n_rows, dtype=torch.float32)
        for kind in ("rank", "log_prob")
        for name in ("answer", "other")
    }
    guesses = [""] * len(facts)
    for length, which in by_length.items():
        targets = {
            name: torch.tensor([[target_id(model, texts[at])] * length for at in which])
            for name, texts in (("answer", [answer for *_, answer in facts]), ("other", others))
        }
        lens = logit_lens(
            model,
            torch.cat([tokens[at] for at in which]),
            positions=[length - 1],
            targets=targets,
            statistics=["rank", "log_prob"],
            top_k=1,
        )
        for kind in ("rank", "log_prob"):
            for name in targets:
                values: Tensor = getattr(lens, kind)[name]
                found[f"{kind} {name}"][which] = values[:, :, 0].T
        for at, guess in zip(which, lens.texts(lens.top_ids[-1, :, 0, 0]), strict=True):
            guesses[at] = guess
    return Facts(
        model=describe(model),
        relations=tuple(relation for relation, _, _ in facts),
        prompts=tuple(prompt for _, prompt, _ in facts),
        answers=tuple(answer for *_, answer in facts),
        others=tuple(others),
        guesses=tuple(guesses),
        rank=found["rank answer"],
        log_prob=found["log_prob answer"],
        other_rank=found["rank other"],
        other_log_prob=found["log_prob other"],
        prepend_bos=tokens[0].shape[1] > text_tokens(model, facts[0][1], prepend_bos=False).shape[1],
    )


def _other_answers(facts: Sequence[Fact]) -> list[str]:
    """For each fact, the next different answer of the same relation."""
    others = []
    for at, (relation, _, answer) in enumerate(facts):
        following = [*facts[at + 1 :], *facts[:at]]
        wrong = [other for same, _, other in following if same == relation and other != answer]
        if not wrong:
            raise ValueError(
                f"the relation {relation!r} needs two different answers, one as the null baseline, got only "
                f"{answer!r}"
            )
        others.append(wrong[0])
    return others


@dataclasses.dataclass(frozen=True)
class FactsStudy(Study):
    """The same facts, read with BOS and without."""

    facts: Facts
    facts_without_bos: Facts

    def quantities(self) -> dict[str, Measured]:
        # Rounding may decide between two answers that are equally likely; it moves probabilities far less
        # than their tolerance.
        one = 1.5 / len(FACTS)
        measured: dict[str, Measured] = {}
        for name, words, facts in (
            ("", "", self.facts),
            (" without BOS", ", without BOS", self.facts_without_bos),
        ):
            known, eiffel = facts.known, facts.prompts.index(EIFFEL)
            measured |= {
                f"known{name}": Measured(
                    float(known.float().mean()),
                    f"share of {len(FACTS)} facts whose answer is the top-1 prediction{words}",
                    one,
                    among=known.float(),
                ),
                f"known null{name}": Measured(
                    float((facts.other_rank[:, -1] == 1).float().mean()),
                    "share of facts for which a wrong answer of the same relation is the top-1 "
                    f"prediction{words}",
                    one,
                ),
                f"probability{name}": Measured(
                    float(facts.probability()[-1]),
                    f"mean probability of the answer{words}",
                    0.01,
                    among=facts.log_prob[:, -1].exp(),
                ),
                f"half in top 10{name}": Measured(
                    _first(facts.share(10) >= 0.5),
                    f"first layer from which half of the answers are in the top 10{words}",
                ),
                f"half first{name}": Measured(
                    _first(facts.share(1) >= 0.5),
                    f"first layer from which half of the answers are the top-1 prediction{words}",
                ),
                f"Paris{name}": Measured(
                    float(facts.log_prob[eiffel, -1].exp()),
                    f"probability of Paris after {EIFFEL!r}{words}",
                    0.01,
                ),
                f"Paris first{name}": Measured(
                    _first(facts.rank[eiffel] == 1),
                    f"first layer from which Paris is the top-1 prediction after {EIFFEL!r}{words}",
                ),
            }
        return measured

    def sections(self) -> list[Section]:
        return [section(self.facts, without_bos=self.facts_without_bos)]


def study_facts(model: LensModel) -> FactsStudy:
    """Read `FACTS` with the logit lens, with BOS and without.

    Cost: as `read_facts`, twice.
    """
    return FactsStudy((), read_facts(model), read_facts(model, prepend_bos=False))


def _first(holds: Tensor) -> int | str:
    """The first layer from which a condition holds up to the last one; -1 is the embedding."""
    if not holds[-1]:
        return "none"
    after_last_failure = int((~holds).nonzero().max()) + 1 if bool((~holds).any()) else 0
    return after_last_failure - 1
