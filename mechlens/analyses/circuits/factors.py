"""What all circuits need: checking heads, reading tokens, and making the result."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.arguments import check_model, check_type
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel, describe
from mechlens.models.weights.folding import from_tokens
from mechlens.models.weights.rotary import NO_ROTATION, HeadRotation
from mechlens.results import Circuit, head_label, parse_head
from mechlens.results.heads import Head, Heads, check_in_range
from mechlens.text.tokens import target_id

EMBEDDINGS = ("W_E", "effective")
_IDENTITY = ("name", "revision", "n_layers", "n_heads", "d_model", "d_vocab")
"""What must agree between a circuit's model and the model it is read with. Processing and engine may differ,
because they do not change a circuit."""
QUERY_KEY, SOURCE_DESTINATION = ("query", "key"), ("source", "destination")


def check_head(model: LensModel, head: Head) -> tuple[int, int]:
    """(layer, head) of one head.

    Raises:
        TypeError: not a head, or several.
        ValueError: the model does not have it.
    """
    if isinstance(head, (list, tuple)) and any(isinstance(part, (str, list, tuple)) for part in head):
        raise TypeError(f"this circuit takes one head, such as 'L5H5' or (5, 5), got a list: {head!r}")
    check_model(model)
    layer, index = parse_head(head)
    check_in_range(layer, index, model.cfg.n_layers, model.cfg.n_heads)
    return layer, index


def check_heads(model: LensModel, heads: Heads) -> list[tuple[int, int]]:
    """(layer, head) of one or several different heads, earliest first."""
    try:
        several: list[Any] = [heads] if isinstance(heads, str) else list(heads)
    except TypeError:
        raise TypeError(
            f"heads must be one head or a list of them, such as L5H5, 5.5 or (5, 5), got {heads!r}"
        ) from None
    # two numbers are one head
    if several and all(isinstance(part, Number) or getattr(part, "ndim", None) == 0 for part in several):
        several = [heads]
    found = [check_head(model, head) for head in several]
    if not found or len(set(found)) < len(found):
        raise ArgumentError("heads", "one or several different heads", heads)
    return sorted(found)


def head_pair(model: LensModel, earlier: Head, later: Head) -> tuple[tuple[int, int], tuple[int, int]]:
    """(layer, head) of two heads where the later one can read what the earlier one writes.

    Raises:
        TypeError, ValueError: one is not a head of the model, or the first is not in an earlier layer.
    """
    one, other = check_head(model, earlier), check_head(model, later)
    if one[0] >= other[0]:
        raise ValueError(
            f"{head_label(*other)} reads only what layers before {other[0]} write, and {head_label(*one)} is "
            f"in layer {one[0]}: give the earlier head first"
        )
    return one, other


def check_model_of(model: LensModel, circuit: Circuit) -> None:
    """Check that a circuit was made from this model."""
    info = describe(model)
    check_type("circuit", circuit, Circuit)
    pairs = [(name, getattr(circuit.model, name), getattr(info, name)) for name in _IDENTITY]
    others = ", ".join(f"its {name} is {own!r}, here {here!r}" for name, own, here in pairs if own != here)
    if others:
        raise ValueError(
            f"the {circuit.name} is from another model ({others}): give the model that it was made from"
        )


def token_ids(
    model: LensModel, name: str, tokens: Sequence[str | int] | Int[Tensor, " token"]
) -> Int[Tensor, " token"]:
    """The ids of single tokens given as texts or ids.

    Args:
        name: the argument, for errors.
    """
    if isinstance(tokens, str) or not isinstance(tokens, (Sequence, Tensor)):
        raise ArgumentError(name, "a list of single tokens", tokens)
    listed = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    return torch.tensor([target_id(model, each) for each in listed], dtype=torch.long)


def head_names(heads: Sequence[tuple[int, int]]) -> str:
    """The heads' labels as a sum."""
    return " + ".join(head_label(*head) for head in heads)


def read_tokens(
    model: LensModel, reading: Float[Tensor, "d_model inner"], embedding: str
) -> Float[Tensor, "d_vocab inner"]:
    """What weights read from each token of the vocabulary."""
    if embedding not in EMBEDDINGS:
        raise ArgumentError("embedding", f"one of {', '.join(EMBEDDINGS)}", embedding)
    return from_tokens(model, reading, effective=embedding == "effective")


def read_token_pair(
    model: LensModel,
    queries: Float[Tensor, "d_model inner"],
    keys: Float[Tensor, "d_model inner"],
    embedding: str,
) -> tuple[Float[Tensor, "d_vocab inner"], Float[Tensor, "inner d_vocab"]]:
    """Both factors of a token-by-token QK circuit, with one pass through the embedding."""
    both = read_tokens(model, torch.cat([queries, keys], dim=1), embedding)
    A, B = both.split(queries.shape[1], dim=1)
    return A, B.T


def make_circuit(
    model: LensModel,
    factors: tuple[Float[Tensor, "row inner"], Float[Tensor, "inner column"]],
    name: str,
    heads: Sequence[tuple[int, int]],
    axes: tuple[str, str],
    *,
    space: str = "d_model",
    embedding: str = "none",
    rotation: HeadRotation = NO_ROTATION,
    normalized_positions: bool = False,
) -> Circuit:
    """The result; `embedding` is given if and only if both axes are tokens."""
    space = space if embedding == "none" else "tokens"
    A, B = factors
    return Circuit(
        model=describe(model),
        A=A.contiguous(),
        B=B.contiguous(),
        axes=axes,
        spaces=(space, space),
        name=name,
        heads=tuple(heads),
        embedding=embedding,
        rotary=rotation.kind,
        relative_position=rotation.relative_position,
        normalized_positions=normalized_positions,
    )
