"""Check and convert arguments. Every error names the argument, what it must be, and what was passed."""

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
    """An integer as a plain int; numpy integers and tensors with one element are accepted.

    Raises:
        TypeError: the value is not an integer.
        ArgumentError: it is less than `least`.
    """
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if least is not None and number < least:
        raise ArgumentError(name, f"at least {least}", number)
    return number


def generator_of(seed: Any) -> torch.Generator:
    """A seeded random generator on the CPU.

    Raises:
        TypeError: the seed is not an integer.
        ArgumentError: it is negative, or has more than 64 bits.
    """
    number = whole_number("seed", seed, least=0)
    if number >= 2**64:
        raise ArgumentError("seed", "below 2**64", number)
    return torch.Generator().manual_seed(number)


def check_counts(**counts: Any) -> None:
    """Check that each argument is an integer of at least 1, or None."""
    for name, value in counts.items():
        if value is not None:
            whole_number(name, value, least=1)


def check_reals(**given: Any) -> None:
    """Check that each argument is a finite real number, or None."""
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not math.isfinite(value):
            raise ArgumentError(name, "a finite number", value)


def check_between(name: str, value: Any, low: float, high: float) -> None:
    """Check that a number is in a range, ends included."""
    check_reals(**{name: value})
    if not low <= value <= high:
        raise ArgumentError(name, f"between {low:g} and {high:g}", value)


def seeds_of(seeds: Any) -> tuple[int, ...]:
    """Distinct seeds as a tuple of plain ints.

    Raises:
        TypeError: not a list of integers (a single number is not a list).
        ArgumentError: the list is empty, a seed is negative, or a seed is repeated.
    """
    if isinstance(seeds, (str, bytes)) or not isinstance(seeds, (Iterable, Tensor)):
        raise TypeError(f"seeds must be a list of integers such as range(5) or [0], got {seeds!r}")
    found = tuple(whole_number("each seed", seed, least=0) for seed in seeds)
    if not found:
        raise ArgumentError("seeds", "a list of at least one integer", found)
    if len(set(found)) < len(found):
        raise ArgumentError("seeds", "distinct", found, "a repeated seed draws the same tokens again")
    return found


def names_of(what: str, given: Any, known: Sequence[str], *, may_be_empty: bool = False) -> tuple[str, ...]:
    """One or more of the known names, as a tuple; a single string counts as one name.

    Args:
        what: what errors call a name, in the singular, such as `score`.

    Raises:
        TypeError: neither a string nor a list.
        ValueError: no names, or an unknown one; the error suggests the closest known name.
    """
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, Iterable):
        raise TypeError(f"{what}s must be a list of names such as [{known[0]!r}], got {given!r}")
    found = tuple(names)
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1, 0.5)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"unknown {what} {name!r}{meant}: choose from {', '.join(known)}")
    if not found and not may_be_empty:
        raise ValueError(f"no {what} selected: choose from {', '.join(known)}")
    return found


def chosen(what: str, given: Sequence[SupportsIndex] | SupportsIndex | None, count: int) -> tuple[int, ...]:
    """Indices of positions, layers and the like, as a tuple of ints from 0 to `count - 1`.

    Args:
        what: what is indexed, in the singular, such as `layer`.
        given: one index, several, or a mask of `count` booleans. Negative indices count from the end; None
            selects all.
        count: how many there are.

    Raises:
        TypeError: not an integer, a list of integers or a mask.
        ValueError: nothing is selected, an index is out of range or repeated, or a mask has the wrong length.
    """
    if given is None:
        return tuple(range(count))
    mask = _as_mask(what, given, count)
    if mask is not None:
        given = [index for index, wanted in enumerate(mask) if wanted]
    try:
        # plain ints, because results save these values
        if not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
            given = (given,)  # type: ignore[assignment]
        indices = tuple(whole_number(what, index) for index in given)  # type: ignore[union-attr]
    except TypeError:
        raise TypeError(f"{what}s must be integers such as [0, 1], got {given!r}") from None
    for index in indices:
        if not -count <= index < count:
            there = f"there are {what}s 0 to {count - 1}" if count > 1 else f"the only {what} is 0"
            raise ValueError(f"{what} {index} is out of range: {there}")
    if not indices:
        raise ValueError(f"no {what} selected: give at least one of 0 to {count - 1}")
    found = tuple(index % count for index in indices)
    if len(set(found)) < len(found):
        twice = next(index for index in found if found.count(index) > 1)
        raise ValueError(f"{what} {twice} is given twice: {list(indices)}")
    return found


def _as_mask(what: str, given: Any, count: int) -> list[bool] | None:
    """The values of a boolean mask; None if `given` is not a mask."""
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
            f"a mask of {what}s must have {count} booleans in one row, got shape {np.shape(values)}"
        )
    return values


def check_type(name: str, value: Any, *types: type) -> None:
    """Check an argument's type."""
    if not isinstance(value, types):
        wanted = " or ".join(_one(each) for each in types)
        plain = value is None or isinstance(value, (str, int, float))
        raise TypeError(f"{name} must be {wanted}, got {repr(value) if plain else _one(type(value))}")


def check_model(model: Any) -> None:
    """Check that a model was passed, not its name, for example."""
    if not (hasattr(model, "cfg") and hasattr(model, "tokenizer")):
        raise not_a_model(model)


def not_a_model(given: Any) -> TypeError:
    """The error for an argument that should be a model."""
    kind = f"{type(given).__module__}.{type(given).__qualname__}".removeprefix("builtins.")
    return TypeError(
        f"model must be a HookedTransformer or a TransformerBridge, got {kind}: "
        "load one with mechlens.load_model(name or directory)"
    )


def _one(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"
