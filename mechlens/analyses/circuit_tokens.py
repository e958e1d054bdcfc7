"""Looking at circuits: their entries and directions with the tokens that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.arguments import check_type
from mechlens.measures import weights as measures
from mechlens.models.protocol import LensModel, describe
from mechlens.models.weights.folding import from_tokens, to_logits
from mechlens.results import Circuit
from mechlens.text.tokens import target_id, token_strings

if TYPE_CHECKING:
    import pandas as pd

_THE_SAME = ("name", "revision", "n_layers", "n_heads", "d_model", "d_vocab")
"""What a circuit's model and the one it is looked at with share; a circuit is the same in every state of its
model and on both engines, which may give it another context."""


def largest_pairs(
    model: LensModel, circuit: Circuit, n: int = 20, *, progress: bool | None = None
) -> pd.DataFrame:
    """The pairs of tokens (or positions) with the largest entries of a circuit.

    Args:
        model: the one that the circuit was made of.
        circuit: of tokens or of positions.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        One row per pair, the largest entry first: for each axis its number (`query_id`, `key_id`, or
        `source_id`, `destination_id`) and its text (`query`, `key`, or `source`, `destination`), and `value`.

    Raises:
        ValueError: a circuit of another model, or between directions of the stream, whose numbers mean
            nothing by themselves.

    Cost: the whole product once, a tile at a time.
    """
    import pandas as pd

    _check(model, circuit)
    if "d_model" in circuit.spaces:
        raise ValueError(
            f"the {circuit.name} is between directions of the stream, which have no text: take full_OV or "
            "full_QK, or read its directions with singular_tokens"
        )
    found = measures.largest_entries(circuit, n, progress=progress)
    table: dict[str, Any] = {}
    for side, ids in enumerate((found.rows, found.columns)):
        table[f"{circuit.axes[side]}_id"] = ids.tolist()
        table[circuit.axes[side]] = _texts(model, circuit.spaces[side], ids)
    return pd.DataFrame(table | {"value": found.values.tolist()})


def circuit_corner(
    model: LensModel,
    circuit: Circuit,
    rows: Sequence[int | str] | None = None,
    columns: Sequence[int | str] | None = None,
) -> pd.DataFrame:
    """A small part of a circuit as a table, with the text of its tokens along both sides.

    Args:
        model: the one that the circuit was made of.
        rows: tokens of the first axis, as ids or texts of one token each; None is the first 10.
        columns: of the second axis; None is those of `rows`.

    Raises:
        TypeError: a text in place of a list.
        ValueError: a circuit of another model; an empty list; a text that is not one token, or one for an
            axis without.
    """
    import pandas as pd

    _check(model, circuit)
    for side, asked in zip(circuit.axes, (rows, columns), strict=True):
        if isinstance(asked, str):
            raise TypeError(
                f"the {side} tokens are a list of ids or of texts of one token each, but the text {asked!r} "
                f"is given: put it in a list, [{asked!r}]"
            )
        if asked is not None and len(asked) == 0:
            raise ValueError(f"a corner needs at least one {side}, but the list is empty")
    if rows is None:
        rows = range(min(10, *circuit.shape))
    sides = [
        torch.tensor([_index(model, circuit, side, each) for each in asked], dtype=torch.long)
        for side, asked in enumerate((rows, rows if columns is None else columns))
    ]
    values = measures.corner(circuit, *sides).cpu()
    labels = [
        pd.Index(_texts(model, circuit.spaces[side], ids), name=circuit.axes[side])
        for side, ids in enumerate(sides)
    ]
    return pd.DataFrame(values.numpy(), index=labels[0], columns=labels[1])


def singular_tokens(model: LensModel, circuit: Circuit, *, n: int = 3, k: int = 10) -> pd.DataFrame:
    """The strongest directions of a circuit, as the tokens that lie farthest along them.

    A direction is a pair of singular vectors, one for each axis: the circuit maps the one onto the other.
    Tokens at the positive end of one axis go with those at the positive end of the other, and negative ones
    with negative ones; which end is called positive means nothing. For a circuit of d_model x d_model the
    vectors are read through the vocabulary: what is read from the stream by what each token's embedding has
    of it, what is written to the stream (`destination`) by what it adds to each token's logit.

    Args:
        model: the one that the circuit was made of.
        n: how many directions.
        k: how many tokens at each end.

    Returns:
        One row per token: direction (0 is the strongest), singular_value, axis, end (`positive`, `negative`),
        place (1 is the farthest), id, token, value (the token's component, or what it has or gets of it).

    Raises:
        ValueError: a circuit of another model, more directions than it has, or k out of range.

    Source: of reading singular vectors through the vocabulary: Millidge and Black 2022, "The Singular Value
    Decompositions of Transformer Weight Matrices are Highly Interpretable".
    Cost: QR decompositions of the thin factors.
    """
    import pandas as pd

    _check(model, circuit)
    found = measures.singular(circuit, n)
    # directions of the stream are read as tokens, too
    spaces = ["tokens" if space == "d_model" else space for space in circuit.spaces]
    rows = []
    for side, vectors in enumerate((found.U, found.V)):
        values = _read(model, circuit, side, vectors).cpu()
        if not 1 <= k <= len(values):
            raise ValueError(f"k must lie between 1 and {len(values)}, the circuit's tokens, but is {k}")
        for direction in range(n):
            for end, sign in (("positive", 1), ("negative", -1)):
                top = (sign * values[:, direction]).topk(k)
                texts = _texts(model, spaces[side], top.indices)
                strength = float(found.S[direction])
                rows += [
                    (direction, strength, circuit.axes[side], end, place, index, text, sign * value)
                    for place, (index, text, value) in enumerate(
                        zip(top.indices.tolist(), texts, top.values.tolist(), strict=True), start=1
                    )
                ]
    columns = ["direction", "singular_value", "axis", "end", "place", "id", "token", "value"]
    return pd.DataFrame(rows, columns=columns).sort_values("direction", kind="stable", ignore_index=True)


def _read(
    model: LensModel, circuit: Circuit, side: int, vectors: Float[Tensor, "place n"]
) -> Float[Tensor, "token n"]:
    """What each token (or position) has of singular vectors."""
    if circuit.spaces[side] != "d_model":
        return vectors
    if circuit.axes[side] == "destination":
        return to_logits(model, vectors.T).T
    return from_tokens(model, vectors)


def _check(model: LensModel, circuit: Circuit) -> None:
    info = describe(model)
    check_type("circuit", circuit, Circuit)
    pairs = [(name, getattr(circuit.model, name), getattr(info, name)) for name in _THE_SAME]
    others = ", ".join(f"its {name} is {own!r}, here {here!r}" for name, own, here in pairs if own != here)
    if others:
        raise ValueError(
            f"the {circuit.name} is of another model ({others}): give the model that the circuit was made of"
        )


def _index(model: LensModel, circuit: Circuit, side: int, asked: int | str) -> int:
    if circuit.spaces[side] == "tokens":
        return target_id(model, asked)
    if isinstance(asked, str):
        raise ValueError(f"the {circuit.name} has no tokens on its axis {circuit.axes[side]!r}: give numbers")
    return asked


def _texts(model: LensModel, space: str, ids: Tensor) -> list[str]:
    """Tokens as text, positions and axes of the stream by their number."""
    return list(token_strings(model, ids)) if space == "tokens" else [str(index) for index in ids.tolist()]
