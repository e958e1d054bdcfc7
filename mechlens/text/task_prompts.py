"""Prompts of a task: a clean text, its counterfactual, right and wrong answers, roles of positions."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.errors import ArgumentError
from mechlens.text.prompts import text_tokens
from mechlens.text.tokens import target_id

END = "END"
"""The role of the last position, whose prediction is the model's answer."""
FIELDS = ("clean", "corrupted", "answer", "wrong")
ROLE = "role_"
"""Prefix of a role's column in a file, as in `role_S2`."""


@dataclasses.dataclass(frozen=True)
class TaskPrompt:
    """One prompt of a task, as text.

    Args:
        clean: the text that the answer continues.
        corrupted: its counterfactual, which has as many tokens and another right answer.
        answers: right next tokens, each with its space.
        wrong: wrong next tokens.
        roles: for each role, the character of `clean` at which its word ends. `END` is added by itself.

    Example:
        >>> prompt = mechlens.TaskPrompt("The keys are", "The key are", (" here",), (" there",), {"noun": 8})
        >>> prompt.roles
        {'noun': 8}
    """

    clean: str
    corrupted: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...]
    roles: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """A `TaskPrompt` as tokens of one model."""

    clean: Int[Tensor, "1 pos"]
    corrupted: Int[Tensor, "1 pos"]
    answers: tuple[int, ...]
    wrong: tuple[int, ...]
    roles: dict[str, int]
    """Position of the last token of each role's word."""


def encoded(model: Any, prompt: TaskPrompt, *, prepend_bos: bool | None = None) -> EncodedPrompt:
    """The tokens of a prompt, checked.

    Raises:
        ValueError: clean and corrupted differ in length (the message has both), there is no right or no wrong
            answer, one is not a single token, or a token is both right and wrong.
    """
    clean, corrupted = (
        text_tokens(model, text, prepend_bos=prepend_bos) for text in (prompt.clean, prompt.corrupted)
    )
    if clean.shape != corrupted.shape:
        raise ValueError(
            f"clean and corrupted must have the same number of tokens, got {clean.shape[1]} and "
            f"{corrupted.shape[1]}: {prompt.clean!r} and {prompt.corrupted!r}"
        )
    answers, wrong = (
        tuple(target_id(model, each) for each in some) for some in (prompt.answers, prompt.wrong)
    )
    if not answers or not wrong:
        raise ValueError(f"each prompt needs a right and a wrong answer, but {prompt.clean!r} lacks one")
    if set(answers) & set(wrong):
        raise ValueError(f"{prompt.clean!r} has an answer that is both right and wrong")
    return EncodedPrompt(clean, corrupted, answers, wrong, _positions(model, prompt, clean.shape[1]))


def _positions(model: Any, prompt: TaskPrompt, n_pos: int) -> dict[str, int]:
    found = {}
    if prompt.roles:
        if not getattr(model.tokenizer, "is_fast", False):
            raise ValueError("roles need a fast tokenizer, which knows where each token is in the text")
        offsets = model.tokenizer(
            prompt.clean, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        before = n_pos - len(offsets)
        for role, end in prompt.roles.items():
            inside = [at for at, (start, stop) in enumerate(offsets) if start < end <= stop]
            if not inside:
                raise ValueError(
                    f"the role {role!r} ends at character {end} of {prompt.clean!r}, where there is no token"
                )
            found[role] = before + inside[-1]
    return found | {END: n_pos - 1}


def filled(template: str, values: Mapping[str, str], roles: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """A template with its fields filled in, and where the word of each role ends.

    Args:
        template: such as `"When{a} and{b} went,{a} said"`.
        values: the text of each field.
        roles: the field's name for each role; its second occurrence is written `a#2`.
    """
    text, ends, seen = "", {}, dict.fromkeys(values, 0)
    for before, field, _, _ in string.Formatter().parse(template):
        text += before
        if field is not None:
            text += values[field]
            seen[field] += 1
            ends[field if seen[field] == 1 else f"{field}#{seen[field]}"] = len(text)
    return text, {role: ends[place] for role, place in roles.items()}


def read_prompts(source: str | os.PathLike[str] | Iterable[Mapping[str, Any]]) -> list[TaskPrompt]:
    """Prompts from a .csv or .jsonl file, or from mappings with the same fields.

    Columns: `clean`, `corrupted`, `answer`, `wrong`; in JSON an answer may be a list. A role is a column such
    as `role_S2` that has the word as it is in `clean`; `word#2` is its second occurrence.

    Raises:
        ArgumentError: the file has another ending.
        ValueError: there are no rows, or a column or a role's word is missing; the message has the row.
    """
    rows = _rows(source) if isinstance(source, (str, os.PathLike)) else [dict(row) for row in source]
    if not rows:
        raise ValueError("a task needs at least one prompt")
    return [_prompt(row, number) for number, row in enumerate(rows, 1)]


def _rows(source: str | os.PathLike[str]) -> list[dict[str, Any]]:
    path = Path(source)
    if path.suffix not in (".csv", ".jsonl"):
        raise ArgumentError("source", "a .csv or .jsonl file", str(path))
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            return [dict(row) for row in csv.DictReader(file)]
        return [_object(line, number) for number, line in enumerate(file, 1) if line.strip()]


def _object(line: str, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"line {number} must be an object with {', '.join(FIELDS)}, got {found!r:.80}")
    return found


def _prompt(row: Mapping[str, Any], number: int) -> TaskPrompt:
    for name in FIELDS:
        if not row.get(name):
            raise ValueError(f"row {number} has no {name}: each needs {', '.join(FIELDS)}")
    roles = {
        name.removeprefix(ROLE): _end_of(str(row["clean"]), str(word), number)
        for name, word in row.items()
        if name and name.startswith(ROLE) and word
    }
    answers, wrong = (_several(row[name]) for name in ("answer", "wrong"))
    return TaskPrompt(str(row["clean"]), str(row["corrupted"]), answers, wrong, roles)


def _several(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _end_of(text: str, word: str, number: int) -> int:
    word, which = match.groups() if (match := re.fullmatch(r"(.+)#([1-9]\d*)", word)) else (word, "1")
    end = 0
    for _ in range(int(which)):
        start = text.find(word, end)
        if start < 0:
            raise ValueError(f"row {number}: there is no occurrence {which} of {word!r} in {text!r}")
        end = start + len(word)
    return end


def one_token(model: Any, words: Iterable[str], least: int, what: str) -> list[str]:
    """The words that are one token of this model.

    Raises:
        ValueError: there are fewer than `least`; the message has the number.
    """
    every = list(words)
    found = [word for word in every if is_one_token(model, word)]
    if len(found) < least:
        raise ValueError(
            f"this task needs at least {least} {what} that are one token of this model, but only "
            f"{len(found)} of {len(every)} are"
        )
    return found


def is_one_token(model: Any, word: str) -> bool:
    try:
        # an unknown word is one token, too, but not its own
        return target_id(model, word) != model.tokenizer.unk_token_id
    except ValueError:
        return False


def drawn(generator: torch.Generator, some: Sequence[Any], n: int) -> list[Any]:
    """`n` different entries, in random order."""
    return [some[at] for at in torch.randperm(len(some), generator=generator)[:n].tolist()]
