"""Arguments as people give them: checked, converted, or refused by name."""

from __future__ import annotations

import difflib
import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from mechlens.errors import ArgumentError


def whole_number(name: str, value: Any, *, least: int | None = None) -> int:
    """A whole number; one of numpy or a tensor will do.

    Raises:
        TypeError: the value is not a whole number.
        ArgumentError: it is less than `least`.
    """
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be a whole number, but is {value!r}")
    if least is not None and number < least:
        raise ArgumentError(name, f"at least {least}", number)
    return number


def generator_of(seed: Any) -> torch.Generator:
    """Draws on the CPU that a seed decides.

    Raises:
        TypeError: no whole number.
        ValueError: one below 0, or that torch does not take.
    """
    number = whole_number("seed", seed, least=0)
    if number >= 2**64:
        raise ArgumentError("seed", "below 2**64", number)
    return torch.Generator().manual_seed(number)


def check_counts(**counts: Any) -> None:
    """Refuse what is no whole number of at least 1; None stands for no choice."""
    for name, value in counts.items():
        if value is not None:
            whole_number(name, value, least=1)


def check_reals(**given: Any) -> None:
    """Refuse what is no finite number; None stands for no choice."""
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, but is {value!r}")
        if not math.isfinite(value):
            raise ArgumentError(name, "a finite number", value)


def check_between(name: str, value: Any, low: float, high: float) -> None:
    """Refuse a number outside of a range."""
    check_reals(**{name: value})
    if not low <= value <= high:
        raise ArgumentError(name, f"between {low:g} and {high:g}", value)


def seeds_of(seeds: Any) -> tuple[int, ...]:
    """Several different seeds.

    Raises:
        TypeError: a single number, or something else that is no list of whole numbers.
        ValueError: none, one below 0, or one twice.
    """
    if isinstance(seeds, (str, bytes)) or not isinstance(seeds, (Iterable, Tensor)):
        raise TypeError(f"seeds must be a list of whole numbers, such as range(5) or [0], but is {seeds!r}")
    found = tuple(whole_number("each of seeds", seed, least=0) for seed in seeds)
    if not found:
        raise ValueError("at least one seed is needed, but seeds is empty")
    if len(set(found)) < len(found):
        raise ValueError(
            f"seeds must be distinct, because the same seed draws the same tokens, but are {found}"
        )
    return found


def names_of(what: str, given: Any, known: Sequence[str], *, may_be_empty: bool = False) -> tuple[str, ...]:
    """One or several of some names; a text by itself is one.

    Raises:
        TypeError: something else.
        ValueError: none, or a name that is not known (the nearest is named).
    """
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, Iterable):
        raise TypeError(f"{what}s are given by name, as a list, but this is {given!r}")
    found = tuple(names)
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.5)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"no {what} {name!r} here{meant}; there are {', '.join(known)}")
    if not found and not may_be_empty:
        raise ValueError(f"no {what} is asked for; there are {', '.join(known)}")
    return found


def chosen(what: str, given: Sequence[SupportsIndex] | SupportsIndex | None, count: int) -> tuple[int, ...]:
    """Indices of positions, layers or the like from 0; None is all of them, negative ones count from the end.

    Args:
        given: numbers, a single number, or a mask of `count` truth values.

    Raises:
        TypeError: neither.
        ValueError: none is asked for, one that is not there, or one twice, or a mask of another length.
    """
    if given is None:
        return tuple(range(count))
    mask = _as_mask(what, given, count)
    if mask is not None:
        given = [index for index, wanted in enumerate(mask) if wanted]
    try:
        # plain ints also where they come from an array or a table, because results save them
        if not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
            given = (given,)  # type: ignore[assignment]
        indices = tuple(whole_number(what, index) for index in given)  # type: ignore[union-attr]
    except TypeError:
        raise TypeError(f"{what}s are given as numbers, such as [0, 1], but here is {given!r}") from None
    for index in indices:
        if not -count <= index < count:
            raise ValueError(f"{what} {index} is out of range: there are {what}s 0 to {count - 1}")
    if not indices:
        raise ValueError(f"no {what} is asked for; there are {count}")
    found = tuple(index % count for index in indices)
    if len(set(found)) < len(found):
        raise ValueError(f"the same {what} is asked for twice: {indices}")
    return found


def _as_mask(what: str, given: Any, count: int) -> list[bool] | None:
    """The truth values of a mask; None for what is none."""
    if isinstance(given, (np.ndarray, Tensor)):
        if given.dtype not in (np.dtype(bool), torch.bool):
            return None
        values = given.tolist()
    elif isinstance(given, (list, tuple)) and given and all(isinstance(each, bool) for each in given):
        values = list(given)
    else:
        return None
    if np.ndim(values) != 1 or len(values) != count:
        raise ValueError(
            f"a mask of {what}s needs {count} truth values, but this has shape {np.shape(values)}"
        )
    return values


def check_type(name: str, value: Any, *types: type) -> None:
    """Refuse what is of another type, such as the result of another analysis."""
    if not isinstance(value, types):
        wanted = " or ".join(_one(each) for each in types)
        plain = value is None or isinstance(value, (str, int, float))
        raise TypeError(f"{name} must be {wanted}, but is {repr(value) if plain else _one(type(value))}")


def check_model(model: Any) -> None:
    """Refuse what has neither a configuration nor a place for a tokenizer, such as a model's name."""
    if not (hasattr(model, "cfg") and hasattr(model, "tokenizer")):
        raise no_model(model)


def no_model(given: Any) -> TypeError:
    """The error for what is no model of TransformerLens."""
    came = f"{type(given).__module__}.{type(given).__qualname__}"
    return TypeError(
        f"this needs a HookedTransformer or a TransformerBridge, but got {came}: "
        "load the model with mechlens.load_model(name or directory)"
    )


def _one(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"
