"""Reading circuits as tokens: their largest entries, a submatrix, and their strongest directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.analyses.circuits.factors import check_model_of
from mechlens.arguments import check_counts
from mechlens.errors import ArgumentError
from mechlens.measures import weights as measures
from mechlens.models.protocol import LensModel
from mechlens.models.weights.folding import from_tokens, to_logits
from mechlens.results import Circuit, CircuitSummary
from mechlens.text.prompts import text_ids
from mechlens.text.tokens import target_id, token_strings

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 8
"""Tokens along each side of the submatrix shown by default."""


def summarize_circuit(
    model: LensModel,
    circuit: Circuit,
    *,
    text: str | None = None,
    top: int = 10,
    ks: Sequence[int] = (1, 5),
    progress: bool | None = None,
) -> CircuitSummary:
    """Measure how often a token attends to itself or copies itself in a circuit, and select entries to read.

    Args:
        model: the model that the circuit was made from.
        circuit: a circuit whose axes are both tokens.
        text: the text whose tokens label the submatrix to show; None takes up to 8 tokens of the largest
            entries.
        top: how many of the largest entries to list.
        ks: the values of k for the top-k accuracies.
        progress: show progress bars; None shows them in a terminal and in Jupyter.

    Returns:
        The circuit with its accuracies, largest entries and the tokens to show.

    Raises:
        ValueError: the circuit is from another model or not between tokens; an empty text; a number is out of
            range.

    Example:
        >>> found = mechlens.summarize_circuit(model, mechlens.full_OV(model, "L3H5"), text=" the sea")
        >>> 0 <= found.accuracy_of("destination")[5] <= 1
        True

    Cost: the full matrix computed three times, a tile at a time.
    """
    check_model_of(model, circuit)
    check_counts(top=top)
    if circuit.spaces != ("tokens", "tokens"):
        raise ValueError(f"the {circuit.name} is not between tokens: take full_OV or full_QK")
    if not ks or not all(1 <= k <= circuit.shape[1] for k in ks):
        raise ArgumentError("ks", f"numbers from 1 to {circuit.shape[1]}", tuple(ks))
    # before the work, because an empty text is an error
    chosen = None if text is None else text_ids(model, text, prepend_bos=False).tolist()
    found = circuit.largest(top, progress=progress)
    pairs = torch.tensor(found[[f"{axis}_id" for axis in circuit.axes]].to_numpy())
    unique = list(dict.fromkeys(pairs.flatten().tolist() if chosen is None else chosen))
    shown = unique[:_SHOWN] if chosen is None else unique
    ranks = [circuit.self_ranks(axis, progress=progress) for axis in circuit.axes]
    shares = torch.tensor([[float((each <= k).double().mean()) for k in ks] for each in ranks])
    ids = torch.tensor(sorted({*pairs.flatten().tolist(), *shown}))
    return CircuitSummary(
        **{field.name: getattr(circuit, field.name) for field in dataclasses.fields(Circuit)},
        ks=tuple(ks),
        accuracy=torch.full_like(shares, torch.nan) if circuit.is_zero else shares,
        pairs=pairs,
        values=torch.tensor(found["value"].to_numpy(), dtype=torch.float32),
        shown=tuple(shown),
        strings=dict(zip(map(str, ids.tolist()), token_strings(model, ids), strict=True)),
    )


def largest_pairs(
    model: LensModel, circuit: Circuit, n: int = 20, *, progress: bool | None = None
) -> pd.DataFrame:
    """The pairs of tokens (or positions) with the largest entries of a circuit.

    Args:
        model: the model that the circuit was made from.
        circuit: a circuit between tokens or positions.
        n: how many pairs.
        progress: show a progress bar; None shows one in a terminal and in Jupyter.

    Returns:
        One row per pair, largest entry first: for each axis the id (such as `query_id`) and text (`query`),
        and `value`.

    Raises:
        ValueError: the circuit is from another model, or between directions of the stream; `n` is out of
            range.

    Example:
        >>> mechlens.largest_pairs(model, mechlens.full_OV(model, "L3H5"), 3).columns.tolist()
        ['source_id', 'source', 'destination_id', 'destination', 'value']

    Cost: the full matrix computed once, a tile at a time.
    """
    check_model_of(model, circuit)
    if "d_model" in circuit.spaces:
        raise ValueError(
            f"the {circuit.name} is between directions of the stream, which have no text: take full_OV or "
            "full_QK, or read its directions with singular_tokens"
        )
    table = circuit.largest(n, progress=progress)
    for side, axis in enumerate(circuit.axes):
        ids = torch.tensor(table[f"{axis}_id"].to_numpy())
        table.insert(2 * side + 1, axis, _texts(model, circuit.spaces[side], ids))
    return table


def circuit_corner(
    model: LensModel,
    circuit: Circuit,
    rows: Sequence[int | str] | None = None,
    columns: Sequence[int | str] | None = None,
) -> pd.DataFrame:
    """A submatrix of a circuit as a table, labeled with its tokens.

    Args:
        model: the model that the circuit was made from.
        circuit: any circuit; directions of the stream and positions are labeled with their numbers.
        rows: tokens of the first axis, as ids or as texts of one token each; None is the first 10.
        columns: tokens of the second axis; None is the same as `rows`.

    Returns:
        The entries; index and columns are named after the circuit's axes.

    Raises:
        TypeError: a text instead of a list.
        ValueError: the circuit is from another model; an empty list; a text that is not one token, or a text
            for an axis that is not tokens.

    Example:
        >>> circuit = mechlens.full_OV(model, "L3H5")
        >>> mechlens.circuit_corner(model, circuit, [" the", " of"]).shape
        (2, 2)
    """
    import pandas as pd

    check_model_of(model, circuit)
    for side, given in zip(circuit.axes, (rows, columns), strict=True):
        if isinstance(given, str):
            raise TypeError(
                f"the {side} tokens must be a list of ids or texts, got {given!r}: put it in a list"
            )
        if given is not None and len(given) == 0:
            raise ValueError(f"a corner needs at least one {side}, got an empty list")
    if rows is None:
        rows = range(min(10, *circuit.shape))
    sides = [
        [_index(model, circuit, side, each) for each in given]
        for side, given in enumerate((rows, rows if columns is None else columns))
    ]
    labels = [
        pd.Index(_texts(model, circuit.spaces[side], torch.tensor(ids)), name=circuit.axes[side])
        for side, ids in enumerate(sides)
    ]
    return pd.DataFrame(circuit.corner(*sides).cpu().numpy(), index=labels[0], columns=labels[1])


def singular_tokens(model: LensModel, circuit: Circuit, *, n: int = 3, k: int = 10) -> pd.DataFrame:
    """The strongest directions of a circuit, as the tokens farthest along them.

    A direction is a pair of singular vectors, one for each axis: the circuit maps one onto the other. Tokens
    at the positive end of one axis go with those at the positive end of the other axis, and likewise for the
    negative ends. Which end is called positive is arbitrary. A d_model x d_model circuit is read through the
    vocabulary: directions it reads by each token's embedding, directions it writes by each token's logit.

    Args:
        model: the model that the circuit was made from.
        circuit: any circuit.
        n: how many directions.
        k: how many tokens at each end.

    Returns:
        One row per token: direction (0 is the strongest), singular_value, axis, end (`positive`, `negative`),
        place (1 is the farthest), id, token, value (the token's component along the direction).

    Raises:
        ValueError: the circuit is from another model, or `n` or `k` is out of range.

    Example:
        >>> table = mechlens.singular_tokens(model, mechlens.full_OV(model, "L3H5"), n=1, k=2)
        >>> table["axis"].unique().tolist()
        ['source', 'destination']

    References: Millidge and Black 2022, "The Singular Value Decompositions of Transformer Weight Matrices are
    Highly Interpretable".
    Cost: QR decompositions of the thin factors.
    """
    import pandas as pd

    check_model_of(model, circuit)
    found = measures.singular(circuit, n)
    rows: list[tuple[object, ...]] = []
    for side, vectors in enumerate((found.U, found.V)):
        space = "positions" if circuit.spaces[side] == "positions" else "tokens"
        values = _components(model, circuit, side, vectors).cpu()
        if not 1 <= k <= len(values):
            raise ArgumentError("k", f"between 1 and {len(values)}, the circuit's {space}", k)
        for direction in range(n):
            for end, sign in (("positive", 1), ("negative", -1)):
                top = (sign * values[:, direction]).topk(k)
                texts = _texts(model, space, top.indices)
                start = (direction, float(found.S[direction]), circuit.axes[side], end)
                listed = zip(top.indices.tolist(), texts, top.values.tolist(), strict=True)
                rows += [
                    (*start, place, index, text, sign * value)
                    for place, (index, text, value) in enumerate(listed, start=1)
                ]
    columns = ["direction", "singular_value", "axis", "end", "place", "id", "token", "value"]
    return pd.DataFrame(rows, columns=columns).sort_values("direction", kind="stable", ignore_index=True)


def _components(
    model: LensModel, circuit: Circuit, side: int, vectors: Float[Tensor, "place n"]
) -> Float[Tensor, "token n"]:
    """Each token's (or position's) component along singular vectors."""
    if circuit.spaces[side] != "d_model":
        return vectors
    if circuit.axes[side] == "destination":
        return to_logits(model, vectors.T).T
    return from_tokens(model, vectors)


def _index(model: LensModel, circuit: Circuit, side: int, given: int | str) -> int:
    if circuit.spaces[side] == "tokens":
        return target_id(model, given)
    if isinstance(given, str):
        raise ValueError(f"the {circuit.name} has no tokens on its axis {circuit.axes[side]!r}: give numbers")
    return given


def _texts(model: LensModel, space: str, ids: Tensor) -> list[str]:
    """Tokens as text; positions and directions of the stream as their numbers."""
    return list(token_strings(model, ids)) if space == "tokens" else [str(index) for index in ids.tolist()]
