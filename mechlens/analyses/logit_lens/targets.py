"""Targets: tokens to give the rank and log-probability of, in all accepted forms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.models.protocol import LensModel
from mechlens.results.lens import OWN_TOKENS
from mechlens.text.tokens import target_id

Targets = str | int | Tensor | Sequence[Any] | Mapping[str, Any]


def named_targets(targets: Any) -> Iterator[tuple[str, Any]]:
    """Every target with its name: the given one, its own text, or `target_0` etc. if it differs by position.

    Raises:
        ValueError: a name that every lens already uses.
    """
    if isinstance(targets, Mapping):
        for name in OWN_TOKENS:
            if name in targets:
                raise ValueError(f"every lens has a token {name!r}: choose another name for the target")
        yield from targets.items()
        return
    if isinstance(targets, (str, Integral, Tensor)):
        targets = [targets]
    given: set[str] = set()
    for index, target in enumerate(targets):
        # an id and a text may look the same
        plain = _is_one(target) and str(target) not in {*OWN_TOKENS, *given}
        name = str(target) if plain else f"target_{index}"
        given.add(name)
        yield name, target


def _is_one(target: Any) -> bool:
    """Whether a target is the same token at every position."""
    return isinstance(target, (str, Integral))


def target_ids(model: LensModel, target: Any, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """A target's id at each position.

    Raises:
        TypeError, ValueError: a target is not one token of the model.
    """
    if isinstance(target, Tensor):
        target = target.tolist()
    if _is_one(target) or not isinstance(target, Sequence):
        return torch.full_like(tokens, target_id(model, target))
    nested = target if target and isinstance(target[0], (list, tuple)) else [target]
    if [len(row) for row in nested] != [tokens.shape[1]] * len(tokens):
        raise ValueError(
            f"a target that differs by position needs one id or text per position, {tuple(tokens.shape)}, "
            f"got {' + '.join(str(len(row)) for row in nested)}"
        )
    return torch.tensor([[target_id(model, each) for each in row] for row in nested])
