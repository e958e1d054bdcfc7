"""The built-in tasks, whose prompts are made for the tokenizer at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mechlens.errors import ArgumentError
from mechlens.text.task_prompts import TaskPrompt, drawn, filled, one_token
from mechlens.text.tokens import target_id, token_strings

IOI_TEMPLATES = (
    "When{a} and{b} went to the store,{s} gave a drink to",
    "After{a} and{b} went to the park,{s} gave a book to",
    "Then{a} and{b} had a long argument, and afterwards{s} said to",
)
WOMEN = (" Alice", " Amy", " Anna", " Emma", " Kate", " Laura", " Lucy", " Mary", " Rachel", " Sarah")
MEN = (
    *(" Adam", " Daniel", " David", " George", " Henry", " Jack", " James"),
    *(" John", " Mark", " Martin", " Michael", " Peter", " Robert", " Simon"),
)
SPANS = (
    *("war", "siege", "dynasty", "journey", "voyage", "expedition", "campaign", "reign", "project"),
    *("conflict", "contract", "marriage", "alliance", "strike", "famine", "tour"),
)
"""Things that last for years."""
NUMBERED = {
    "man": "men",
    "woman": "women",
    "child": "children",
    "friend": "friends",
    "hand": "hands",
    "eye": "eyes",
    "key": "keys",
    "book": "books",
    "car": "cars",
    "door": "doors",
    "house": "houses",
    "letter": "letters",
    "picture": "pictures",
    "river": "rivers",
    "road": "roads",
    "ship": "ships",
    "table": "tables",
    "tree": "trees",
    "window": "windows",
    "word": "words",
}
VERBS = ((" is", " are"), (" was", " were"), (" has", " have"))
CAPITALS = {
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
ARGUMENTS = (
    *("load", "size", "file", "last", "name", "page", "code", "text", "date", "line", "user", "path"),
    *("key", "list", "type", "form", "item", "node", "table", "image", "value", "group", "count", "state"),
)
MEANINGS = ("first part", "main source", "old style", "whole set", "small world", "given point", "new order")
COPIED = 14
"""Words of the longest first copy of an induction prompt."""

Maker = Callable[[Any, int, torch.Generator, str], list[TaskPrompt]]


@dataclasses.dataclass(frozen=True)
class BuiltIn:
    """How a task is made."""

    make: Maker
    counterfactuals: Mapping[str, str]
    """How the corrupted text differs, by name; the default comes first."""
    reference: str


def _ioi(model: Any, n: int, generator: torch.Generator, counterfactual: str) -> list[TaskPrompt]:
    names = one_token(model, sorted((*WOMEN, *MEN)), 5, "names")
    prompts = []
    for at in range(n):
        a, b, *others = drawn(generator, names, 5)
        # templates alternate, and so does which of the two names comes first
        subject, given = ("a", "b") if (at // len(IOI_TEMPLATES)) % 2 == 0 else ("b", "a")
        template, own = IOI_TEMPLATES[at % len(IOI_TEMPLATES)], {"a": a, "b": b}
        roles = {"S1": subject, "IO": given, "S2": "s"}
        clean, ends = filled(template, own | {"s": own[subject]}, roles)
        changed = own | {"s": own[given]}
        if counterfactual == "other-names":
            changed = dict(zip("abs", others, strict=True))
        prompts.append(
            TaskPrompt(clean, filled(template, changed, {})[0], (own[given],), (own[subject],), ends)
        )
    return prompts


def _greater_than(model: Any, n: int, generator: torch.Generator, counterfactual: str) -> list[TaskPrompt]:
    by_digit = _years_by_digit(model)
    nouns = one_token(model, [f" {noun}" for noun in SPANS], 2, "nouns")
    # if the answer is the tens digit, there must be a larger and a smaller one
    years = [
        (century, year) for century in range(11, 18) for year in (range(10, 90) if by_digit else range(2, 99))
    ]
    if not by_digit:
        # GPT-2 reads some years, such as 1776, as one token
        years = [each for each in years if _two_pairs(model, *each) and _two_pairs(model, each[0], 1)]
    prompts = []
    for _ in range(n):
        century, year = drawn(generator, years, 1)[0]
        if by_digit:
            answers, wrong = ([str(digit) for digit in some] for some in _digits(year // 10))
        else:
            answers, wrong = (
                [f"{two:02}" for two in some] for some in (range(year + 1, 100), range(2, year + 1))
            )
        template = "The{noun} lasted from the year {start}{year} to the year {start}"
        values = {"noun": drawn(generator, nouns, 1)[0], "start": str(century), "year": f"{year:02}"}
        clean, ends = filled(template, values, {"noun": "noun", "YY": "year", "XX": "start#2"})
        corrupted, _ = filled(template, values | {"year": "01"}, {})
        prompts.append(TaskPrompt(clean, corrupted, tuple(answers), tuple(wrong), ends))
    return prompts


def _two_pairs(model: Any, century: int, year: int) -> bool:
    return [each.strip() for each in _pieces(model, f" {century}{year:02}")] == [str(century), f"{year:02}"]


def _digits(tens: int) -> tuple[range, range]:
    """The tens digits of later years and of earlier ones; the same digit may be either."""
    return range(tens + 1, 10), range(tens)


def _years_by_digit(model: Any) -> bool:
    """Whether years are read digit by digit; False where they are two pairs of digits, as in GPT-2."""
    pieces = [each.strip() for each in _pieces(model, " 1742")]
    if pieces[-2:] == ["4", "2"]:
        return True
    if pieces == ["17", "42"]:
        return False
    raise ValueError(
        "greater-than needs a tokenizer that reads a year as two pairs of digits or digit by digit, but this "
        f"one reads 1742 as {pieces}"
    )


def _pieces(model: Any, text: str) -> Sequence[str]:
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return token_strings(model, torch.tensor(ids))


def _agreement(model: Any, n: int, generator: torch.Generator, counterfactual: str) -> list[TaskPrompt]:
    usable = set(one_token(model, [f" {w}" for pair in NUMBERED.items() for w in pair], 8, "nouns"))
    nouns = [pair for one, many in NUMBERED.items() if usable >= set(pair := (f" {one}", f" {many}"))]
    if len(nouns) < 2:
        raise ValueError(
            "agreement needs two nouns whose singular and plural are one token each, but has fewer"
        )
    verbs = [pair for pair in VERBS if len(one_token(model, pair, 0, "verbs")) == 2]
    if not verbs:
        raise ValueError("agreement needs a verb whose singular and plural are one token each, but has none")
    prompts = []
    for at in range(n):
        subject, other = drawn(generator, nouns, 2)
        plural, template = at % 2, "The{noun} near the{distractor}"
        values = {"noun": subject[plural], "distractor": other[1 - plural]}
        verb = verbs[(at // 2) % len(verbs)]
        clean, ends = filled(template, values, {"subject": "noun", "distractor": "distractor"})
        corrupted, _ = filled(template, values | {"noun": subject[1 - plural]}, {})
        prompts.append(TaskPrompt(clean, corrupted, (verb[plural],), (verb[1 - plural],), ends))
    return prompts


def _capitals(model: Any, n: int, generator: torch.Generator, counterfactual: str) -> list[TaskPrompt]:
    words = [f" {word}" for pair in CAPITALS.items() for word in pair]
    usable = set(one_token(model, words, 4, "countries and capitals"))
    known = [(f" {a}", f" {b}") for a, b in CAPITALS.items() if usable >= {f" {a}", f" {b}"}]
    if len(known) < 2:
        raise ValueError(
            "capitals needs at least 2 countries that, like their capitals, are one token of this model, "
            f"but only {len(known)} of {len(CAPITALS)} are"
        )
    prompts = []
    for _ in range(n):
        (country, capital), (other, wrong) = drawn(generator, known, 2)
        template = "The capital of{country} is the city of"
        clean, ends = filled(template, {"country": country}, {"country": "country"})
        prompts.append(
            TaskPrompt(clean, filled(template, {"country": other}, {})[0], (capital,), (wrong,), ends)
        )
    return prompts


def _gender(model: Any, n: int, generator: torch.Generator, counterfactual: str) -> list[TaskPrompt]:
    sides = ((one_token(model, WOMEN, 1, "names"), " she"), (one_token(model, MEN, 1, "names"), " he"))
    prompts = []
    for at in range(n):
        (own, right), (others, wrong) = sides if at % 2 == 0 else sides[::-1]
        template = "So{name} is a really great friend, isn't"
        clean, ends = filled(template, {"name": drawn(generator, own, 1)[0]}, {"name": "name"})
        corrupted, _ = filled(template, {"name": drawn(generator, others, 1)[0]}, {})
        prompts.append(TaskPrompt(clean, corrupted, (right,), (wrong,), ends))
    return prompts


def _docstring(model: Any, n: int, generator: torch.Generator, counterfactual: str) -> list[TaskPrompt]:
    words = one_token(model, [f" {word}" for word in ARGUMENTS], 10, "argument names")
    template = (
        'def do(self,{a},{b},{c},{d}):\n    """{first}.\n\n'
        "    :param{p}: {second}\n    :param{q}: {third}\n    :param"
    )
    prompts = []
    for _ in range(n):
        a, b, c, d, *others = drawn(generator, words, 8)
        first, second, third = drawn(generator, MEANINGS, 3)
        values = {
            "a": a,
            "b": b,
            "c": c,
            "d": d,
            "p": a,
            "q": b,
            "first": first,
            "second": second,
            "third": third,
        }
        roles = {"A_def": "a", "B_def": "b", "C_def": "c", "A_doc": "p", "B_doc": "q"}
        clean, ends = filled(template, values, roles)
        # other arguments in the definition, so that the described ones no longer tell which comes next
        corrupted, _ = filled(template, values | dict(zip("abcd", others, strict=True)), {})
        prompts.append(TaskPrompt(clean, corrupted, (c,), (a, b, d), ends))
    return prompts


def _induction(model: Any, n: int, generator: torch.Generator, counterfactual: str) -> list[TaskPrompt]:
    known = {f" {word}" for word in (*NUMBERED, *NUMBERED.values(), *SPANS, *ARGUMENTS)}
    usable = one_token(model, sorted(known), COPIED, "words")
    prompts = []
    for at in range(n):
        # one length for all prompts, but five distances between the two occurrences
        words, current = drawn(generator, usable, COPIED - at % 5), 3 + at % 5
        following = current + 1
        # occurs once, as the right answer does
        other = following + 1 + int(torch.randint(len(words) - following - 1, (), generator=generator))
        swapped = list(words)
        swapped[following], swapped[other] = words[other], words[following]
        again = words[:following]
        clean = _text_of(model, [*words, *again])
        roles = {"FIRST": current, "NEXT": following, "OTHER": other}
        ends = {
            role: len(clean) - len("".join([*words[place + 1 :], *again])) for role, place in roles.items()
        }
        corrupted = _text_of(model, [*swapped, *again])
        prompts.append(TaskPrompt(clean, corrupted, (words[following],), (words[other],), ends))
    return prompts


def _text_of(model: Any, words: Sequence[str]) -> str:
    """The text that is read as these words, one token each.

    Raises:
        ValueError: there is none.
    """
    ids, text = [target_id(model, word) for word in words], "".join(words)
    # Llama's tokenizer puts a space before the text
    for each in (text, text.removeprefix(" ")):
        if model.tokenizer(each, add_special_tokens=False)["input_ids"] == ids:
            return each
    raise ValueError(f"this tokenizer does not read the words of {text!r} as one token each")


BUILT_IN: dict[str, BuiltIn] = {
    "ioi": BuiltIn(
        _ioi,
        {
            "swap-subject": "the indirect object is repeated instead of the subject, which swaps the answer",
            "other-names": "three other names, so that no name is repeated",
        },
        "Wang et al. 2022, arXiv:2211.00593",
    ),
    "greater-than": BuiltIn(
        _greater_than,
        {"year-01": "the first year ends in 01, so nearly every year is later"},
        "Hanna et al. 2023, arXiv:2305.00586",
    ),
    "agreement": BuiltIn(
        _agreement, {"number": "the subject has the other number"}, "Linzen et al. 2016, arXiv:1611.01368"
    ),
    "capitals": BuiltIn(
        _capitals, {"country": "another country is named"}, "Meng et al. 2022, arXiv:2202.05262"
    ),
    "gender": BuiltIn(
        _gender, {"name": "the name is of the other gender"}, "Mathwin et al. 2023, gendered pronouns"
    ),
    "docstring": BuiltIn(
        _docstring,
        {"definition": "the definition has other argument names"},
        "Heimersheim and Janiak 2023, a circuit for Python docstrings",
    ),
    "induction": BuiltIn(
        _induction,
        {
            "other-successor": "the right and the wrong answer have changed places in the first copy, which "
            "swaps the answer"
        },
        "Olsson et al. 2022, arXiv:2209.11895",
    ),
}
"""By name."""


def made(
    model: Any, name: str, n: int, generator: torch.Generator, counterfactual: str | None
) -> tuple[list[TaskPrompt], str]:
    """The prompts of a built-in task, and which counterfactual they have.

    Raises:
        ArgumentError: there is no such task or counterfactual.
        ValueError: too few words are one token of this model.
    """
    if name not in BUILT_IN:
        raise ArgumentError("name", f"one of {', '.join(BUILT_IN)}", name)
    task = BUILT_IN[name]
    if counterfactual is not None and counterfactual not in task.counterfactuals:
        raise ArgumentError("counterfactual", f"one of {', '.join(task.counterfactuals)}", counterfactual)
    chosen = counterfactual or next(iter(task.counterfactuals))
    return task.make(model, n, generator, chosen), chosen
