"""What a language model knows, and after which layer it can be read off the residual stream."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mechlens.analyses.logit_lens import logit_lens
from mechlens.arguments import check_model
from mechlens.models.protocol import LensModel, describe
from mechlens.results import Facts, Result
from mechlens.studies.study import Measured, Study
from mechlens.text.prompts import text_tokens
from mechlens.text.tokens import target_id

Fact = tuple[str, str, str]
"""Relation, prompt and answer (with the blank before it)."""

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
_CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Ireland": "Dublin",
    "Portugal": "Lisbon",
    "Poland": "Warsaw",
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
    *_facts("capital of a country", "The capital of {} is the city of", _CAPITALS),
    *_facts("language of a country", "The official language of {} is", _LANGUAGES),
    *_facts("opposite of a word", "The opposite of {} is", _OPPOSITES),
    *_facts("surname", "{}", _NAMES),
    *_facts("science", "{}", _SCIENCE),
)
"""48 facts, chosen before any was tried. All stay in, whether a model knows them or not."""
EIFFEL = "The Eiffel Tower is in the city of"


def read_facts(model: LensModel, facts: Sequence[Fact] = FACTS, *, prepend_bos: bool | None = None) -> Facts:
    """Read the answer to each fact off every layer with the logit lens.

    Args:
        facts: (relation, prompt, answer): the answer is one token, with the blank before it. Each relation
            needs two different answers, because the answer to another fact is the null.
        prepend_bos: None prepends BOS where the tokenizer has one.

    Returns:
        Rank and log-probability of each answer, and of a wrong one of the same relation, after every layer.

    Raises:
        ValueError: no facts, an answer that is not one token of this model, a relation with one answer.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    Cost: a forward pass for each length of prompt, and a product with `W_U` for each fact and layer.

    Example:
        >>> found = mechlens.read_facts(model)
        >>> found.share(top=10)  # of the facts, by row: embedding, then layers
    """
    check_model(model)
    if not facts:
        raise ValueError("facts must have at least one (relation, prompt, answer)")
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
            progress=False,
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
    """For each fact the answer to the next one of its relation that has another."""
    others = []
    for at, (relation, _, answer) in enumerate(facts):
        following = [*facts[at + 1 :], *facts[:at]]
        wrong = [other for same, _, other in following if same == relation and other != answer]
        if not wrong:
            raise ValueError(
                f"the relation {relation!r} has one answer only, {answer!r}: a second is needed as the null"
            )
        others.append(wrong[0])
    return others


@dataclasses.dataclass(frozen=True)
class FactsStudy(Study):
    """What a model knows, read with BOS and without."""

    with_bos: Facts
    without_bos: Facts

    @property
    def results(self) -> Mapping[str, Result]:
        return {"facts": self.with_bos, "facts_without_bos": self.without_bos}


def measure_facts(model: LensModel) -> tuple[FactsStudy, dict[str, Measured]]:
    """Read `FACTS` off a model, and put into numbers what is to be claimed of it."""
    study = FactsStudy((), read_facts(model), read_facts(model, prepend_bos=False))
    # rounding may turn over one answer that is as likely as another; it moves probabilities far less than
    # their tolerance
    one = 1.5 / len(FACTS)
    measured: dict[str, Measured] = {}
    for name, words, facts in (
        ("", "", study.with_bos),
        (" without BOS", ", without BOS", study.without_bos),
    ):
        known, eiffel = facts.known, facts.prompts.index(EIFFEL)
        measured |= {
            f"known{name}": Measured(
                f"share of {len(FACTS)} facts whose answer is the first guess{words}",
                float(known.float().mean()),
                one,
                among=known.float(),
            ),
            f"known null{name}": Measured(
                f"share for which a wrong answer of the same kind is the first guess{words}",
                float((facts.other_rank[:, -1] == 1).float().mean()),
                one,
            ),
            f"probability{name}": Measured(
                f"mean probability of the answer{words}",
                float(facts.probability()[-1]),
                0.01,
                among=facts.log_prob[:, -1].exp(),
            ),
            f"half in top 10{name}": Measured(
                f"first layer after which half of the answers are among the ten most likely tokens{words}",
                _first(facts.share(10) >= 0.5),
            ),
            f"half first{name}": Measured(
                f"first layer after which half of the answers are the most likely token{words}",
                _first(facts.share(1) >= 0.5),
            ),
            f"Paris{name}": Measured(
                f"probability of Paris after {EIFFEL!r}{words}", float(facts.log_prob[eiffel, -1].exp()), 0.01
            ),
            f"Paris first{name}": Measured(
                f"layer from which on Paris is the first guess there{words}",
                _first(facts.rank[eiffel] == 1),
            ),
        }
    return study, measured


def _first(holds: Tensor) -> int | str:
    """The first layer from which on something holds to the end; -1 is the embedding."""
    if not holds[-1]:
        return "none"
    after_last_failure = int((~holds).nonzero().max()) + 1 if bool((~holds).any()) else 0
    return after_last_failure - 1
