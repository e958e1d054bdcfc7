"""Measures of matrices that are kept as a product of two thin ones, `A [row, inner] @ B [inner, column]`.

The product itself is never built: GPT-2's over its vocabulary has 10 GB. It is read in tiles that are small
enough to stay near the processor while they are reduced.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Complex, Float, Int, Real
from torch import Tensor

from mechlens.arguments import generator_of
from mechlens.progress import progress_bar

TILE_ROWS = 1024
TILE_COLUMNS = 1024
"""Of a tile, 4 MiB in float32: a shape at which product and reduction are fast. A multiple of `TILE_ROWS`, so
that the diagonal of a block of rows lies in one tile."""
AXES = ("query", "key")
"""What rows and columns are called where a circuit does not say."""


@runtime_checkable
class Factored(Protocol):
    """A matrix as a product `A @ B`: a `Circuit`, or a `FactoredMatrix` of TransformerLens.

    Where it has `axes`, they are the names of its rows and columns; else these are `AXES`.
    """

    @property
    def A(self) -> Tensor: ...

    @property
    def B(self) -> Tensor: ...


class Entries(NamedTuple):
    """Some entries of a circuit, the largest first."""

    rows: Int[Tensor, " entry"]
    columns: Int[Tensor, " entry"]
    values: Float[Tensor, " entry"]


class Singular(NamedTuple):
    """The largest singular values of a circuit and their vectors, which is about `U @ S.diag() @ V.T`."""

    U: Float[Tensor, "row n"]
    """Orthonormal columns; of each, the entry that is largest in magnitude is positive."""
    S: Float[Tensor, " n"]
    """Descending."""
    V: Float[Tensor, "column n"]
    """Orthonormal columns."""


def diagonal_ranks(
    circuit: Factored,
    over: str | None = None,
    *,
    tokens: Int[Tensor, " token"] | Sequence[int] | None = None,
    ties: str = "for",
    progress: bool | None = None,
) -> Int[Tensor, " token"]:
    """Rank of each token's entry with itself, `(i, i)`, among its entries with all tokens.

    Args:
        over: the axis along which candidates lie, by its name. The second axis (`key`; the default, None)
            ranks entry `(i, i)` within row `i`: for each query, among all keys. The first (`query`) ranks it
            within column `i`: for each key, among all queries.
        tokens: for which it is asked; None asks for all. Candidates are the whole vocabulary all the same.
        ties: `for` the diagonal counts strictly larger entries only; `against` it counts equal ones too.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        1 is the largest entry; `d_vocab` at most. In the order of `tokens`.

    Raises:
        TypeError: tokens that are no integers.
        ValueError: a circuit that is not square or not finite, an axis that it does not have, a token out of
            range, or another word for `ties`.

    Cost: the product of the asked rows with all columns, and two passes over each tile of it. Memory for a
    tile (4 MiB), and for a copy of the factors where they are narrower than float32 or tokens are asked for.
    """
    rows, columns = _square(circuit, over)
    compare = {"for": torch.gt, "against": torch.ge}.get(ties)
    if compare is None:
        raise ValueError(f"ties must be 'for' or 'against' the diagonal, but is {ties!r}")
    place = None
    if tokens is not None:
        ids, place = _ids("token", tokens, len(rows)).to(rows.device).unique(return_inverse=True)
        # the asked tokens' own columns come first, so that a block's diagonal lies in one tile here as well
        others = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        others[ids] = False
        rows, columns = rows[ids], columns[:, torch.cat([ids, others.nonzero()[:, 0]])]
    ranks = torch.empty(len(rows), dtype=torch.long, device=rows.device)
    room = _room(rows)
    blocks = _slices(len(rows), TILE_ROWS)
    for block in progress_bar(blocks, desc="ranks", unit="tile", progress=progress):
        some = rows[block]
        tiles = _slices(columns.shape[1], TILE_COLUMNS)
        # the tile with the diagonal comes first and is multiplied once: another product may round its entries
        # otherwise, and rank them by that
        home = tiles.pop(block.start // TILE_COLUMNS)
        own, rank = None, torch.full_like(ranks[block], 1 if ties == "for" else 0)
        for tile in (home, *tiles):
            # a narrow product may round otherwise as well: the last one takes columns of the one before along
            start = max(0, min(tile.start, columns.shape[1] - TILE_COLUMNS))
            entries = _product(some, columns[:, start : tile.stop], room)
            if own is None:
                own = entries.diagonal(block.start - start)[:, None].clone()
            counted = entries[:, tile.start - start :]
            # counted in floats, which is faster than summing booleans, and exact within a tile
            rank += compare(counted, own, out=counted).sum(1).long()
        ranks[block] = rank
    return ranks if place is None else ranks[place]


def top_k_accuracy(
    circuit: Factored,
    k: int,
    over: str | None = None,
    *,
    tokens: Int[Tensor, " token"] | Sequence[int] | None = None,
    weights: Real[Tensor, " token"] | Sequence[float] | None = None,
    ties: str = "for",
    progress: bool | None = None,
) -> float:
    """How often a token's entry with itself is among the k largest of its entries with all tokens.

    Args:
        k: 1 asks whether none is larger.
        over, tokens, ties, progress: as for `diagonal_ranks`.
        weights: of each token that is asked for, such as its frequency; they need not sum to 1. None weighs
            all alike.

    Returns:
        A share in [0, 1].

    Raises:
        TypeError: as `diagonal_ranks`, or k that is no whole number.
        ValueError: as `diagonal_ranks`; or k that the vocabulary does not have, no tokens, or
            weights that are negative, not finite, all zero or not one for each token.

    Source: the seed's "top 1 accuracy" is `over="key"`, which is here the default.
    Cost: that of `diagonal_ranks`.
    """
    d_vocab = len(_square(circuit, over)[0])
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"k must be a whole number, but is {k!r}") from None
    if not 1 <= k <= d_vocab:
        raise ValueError(f"k must lie between 1 and the vocabulary of {d_vocab}, but is {k}")
    ids = torch.arange(d_vocab) if tokens is None else _ids("token", tokens, d_vocab)
    asked = len(ids)
    if asked == 0:
        raise ValueError("an accuracy needs at least 1 token, but there is none")
    shares = torch.ones(asked, dtype=torch.float32) if weights is None else torch.as_tensor(weights)
    # in float64 on the processor: a GPU may have none
    shares = shares.detach().cpu().double()
    if shares.shape != (asked,):
        raise ValueError(
            f"weights must be one for each of {asked} tokens, but have shape {tuple(shares.shape)}"
        )
    if not (shares.isfinite().all() and (shares >= 0).all() and shares.sum() > 0):
        raise ValueError("weights must be finite and not negative, and one of them larger than 0")
    hits = diagonal_ranks(circuit, over, tokens=tokens, ties=ties, progress=progress).cpu() <= k
    return float(shares[hits].sum() / shares.sum())


def largest_entries(circuit: Factored, n: int, *, progress: bool | None = None) -> Entries:
    """The n largest of all entries, in descending order; equal ones by their row, then by their column.

    Args:
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Raises:
        ValueError: n that the circuit does not have, or a circuit that is not finite.

    Cost: the whole product and one pass over each tile of it, and a few over rows that may hold one of the n.
    """
    A, B = _factors(circuit)
    n_columns = B.shape[1]
    if not 1 <= n <= len(A) * n_columns:
        raise ValueError(f"n must lie between 1 and the circuit's {len(A)} x {n_columns} entries, but is {n}")
    room = _room(A)
    values, places = A.new_empty(0), torch.empty(0, dtype=torch.long, device=A.device)
    lowest, last = -math.inf, len(A) * n_columns
    blocks = _slices(len(A), TILE_ROWS)
    for block in progress_bar(blocks, desc="largest entries", unit="tile", progress=progress):
        for tile in _slices(n_columns, TILE_COLUMNS):
            entries = _product(A[block], B[:, tile], room)
            best = entries.amax(1)
            largest = float(best.max())
            if largest < lowest or (largest == lowest and block.start * n_columns + tile.start > last):
                continue
            # most often only a row or two have what is wanted
            some = (best >= lowest).nonzero()[:, 0]
            entries = entries[some]
            high = entries >= lowest
            if high.sum() > n:
                high = entries >= entries.flatten().topk(n).values[-1]
            row, column = high.nonzero(as_tuple=True)
            values = torch.cat([values, entries[row, column]])
            places = torch.cat([places, (some[row] + block.start) * n_columns + column + tile.start])
            order = places.argsort()
            order = order[values[order].argsort(descending=True, stable=True)][:n]
            values, places = values[order], places[order]
            if len(values) == n:
                lowest, last = float(values[-1]), int(places[-1])
    return Entries(places // n_columns, places % n_columns, values)


def row(circuit: Factored, index: int) -> Float[Tensor, " column"]:
    """One row of a circuit: of a query with all keys, or of a source with all destinations.

    Raises:
        ValueError: no such row.
    """
    return corner(circuit, [index], None)[0]


def column(circuit: Factored, index: int) -> Float[Tensor, " row"]:
    """One column of a circuit: of a key with all queries, or of a destination with all sources.

    Raises:
        ValueError: no such column.
    """
    return corner(circuit, None, [index])[:, 0]


def corner(
    circuit: Factored,
    rows: Int[Tensor, " row"] | Sequence[int] | None,
    columns: Int[Tensor, " column"] | Sequence[int] | None,
) -> Float[Tensor, "row column"]:
    """The entries of some rows with some columns, in their order; None takes all.

    Raises:
        TypeError: rows or columns that are no integers.
        ValueError: one out of range.

    Cost: memory for what is asked for, which is yours to keep small.
    """
    A, B = _factors(circuit)
    if rows is not None:
        A = A[_ids("row", rows, len(A)).to(A.device)]
    if columns is not None:
        B = B[:, _ids("column", columns, B.shape[1]).to(B.device)]
    return A @ B


def singular(circuit: Factored, n: int) -> Singular:
    """The n largest singular values of a circuit, with their vectors.

    Raises:
        ValueError: n below 1 or above the smallest of rows, columns and inner dimension, or a circuit that is
            not finite.

    Cost: QR decompositions of the thin factors and the SVD of an `[inner, inner]` matrix.
    """
    A, B = _factors(circuit)
    most = min(*A.shape, B.shape[1])
    if not 1 <= n <= most:
        raise ValueError(f"n must lie between 1 and {most}, the most that can differ from 0, but is {n}")
    left, left_R = torch.linalg.qr(A)
    right, right_R = torch.linalg.qr(B.mT)
    U, S, Vh = torch.linalg.svd(left_R @ right_R.mT)
    U, V = left @ U[:, :n], right @ Vh[:n].mT
    # vectors are given up to a common sign only
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return Singular(U * sign, S[:n], V * sign)


def eigenvalues(circuit: Factored) -> Complex[Tensor, " eigenvalue"]:
    """The eigenvalues of a circuit that can differ from 0, the largest in magnitude first.

    Returns:
        As many as the inner dimension, or as the vocabulary where that is smaller.

    Raises:
        ValueError: a circuit that is not square or not finite.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", "Eigenvalue analysis".
    Cost: the eigenvalues of `B @ A`, `[inner, inner]`, which are those of `A @ B` up to zeros.
    """
    A, B = _square(circuit, None)
    small = B @ A if A.shape[1] <= len(A) else A @ B
    # on the processor: what solves this on a GPU is not in every build
    found = torch.linalg.eigvals(small.cpu())
    return found[found.abs().argsort(descending=True, stable=True)].to(A.device)


def eigenvalue_copying_score(circuit: Factored) -> float:
    """How far a circuit's eigenvalues are positive, so that a token raises itself: `Σ Re λ / Σ |λ|`.

    Returns:
        In [-1, 1]: 1 where all are real and positive. nan where all are zero, up to what the product of the
        factors is rounded by.

    Raises:
        ValueError: a circuit that is not square or not finite.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", whose `Σ λ / Σ |λ|` is
    the same, because complex eigenvalues come in pairs.
    Cost: that of `eigenvalues`.
    """
    A, B = _factors(circuit)
    found = eigenvalues(circuit)
    total = float(found.abs().sum())
    if total <= torch.finfo(A.dtype).eps * float(A.norm() * B.norm()):
        return math.nan
    return max(-1.0, min(1.0, float(found.real.sum()) / total))


def composition_scores(
    A1: Float[Tensor, "source input inner1"],
    B1: Float[Tensor, "source inner1 d_model"],
    A2: Float[Tensor, "destination d_model inner2"],
    B2: Float[Tensor, "destination inner2 output"],
    *,
    source_layers: Int[Tensor, " source"] | None = None,
    destination_layers: Int[Tensor, " destination"] | None = None,
) -> Float[Tensor, "source destination"]:
    """How much of what one head writes is read by another: `‖M1 M2‖ / (‖M1‖ ‖M2‖)`, Frobenius norms.

    Args:
        A1, B1: the thin factors of the sources' matrices `M1 = A1 @ B1`, for example `W_V` and `W_O`.
        A2, B2: those of the destinations, `M2 = A2 @ B2`: `W_Q`, `W_K.mT` (q composition), `W_K`, `W_Q.mT`
            (k), `W_V`, `W_O` (v).
        source_layers, destination_layers: of each matrix, both or neither. Only pairs with the source in an
            earlier layer than the destination are then computed.

    Returns:
        In [0, 1]; about `d_model ** -0.5` for random matrices (`random_composition`). nan where a matrix is
        zero, and for pairs that are not earlier to later.

    Raises:
        ValueError: layers of one side only.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", in row-vector form and
    without the baseline taken off.
    Cost: QR decompositions of the outer factors, then one product of all `[source * inner1, d_model]` with
    `[d_model, destination * inner2]`, in tiles.
    """
    if (source_layers is None) != (destination_layers is None):
        raise ValueError("layers must be given of sources and destinations both, or of neither")
    # the orthonormal columns of A1 = QR change no norm, and neither do those of B2's transpose
    left = _of_norm_1(_triangle(_wide(A1)) @ _wide(B1))
    right = _of_norm_1(_triangle(_wide(B2).mT) @ _wide(A2).mT)
    scores = left.new_full((len(left), len(right)), torch.nan)
    if source_layers is None or destination_layers is None:
        pairs = [(torch.arange(len(left)), torch.arange(len(right)))]
    else:
        pairs = [
            ((source_layers == layer).nonzero()[:, 0], (destination_layers > layer).nonzero()[:, 0])
            for layer in source_layers.unique()
        ]
    room = left.new_empty(0)
    for sources, destinations in pairs:
        if len(destinations) == 0:
            continue
        for some in sources.to(left.device).split(max(1, TILE_ROWS // left.shape[1])):
            rows = left[some].flatten(0, 1)
            for others in destinations.to(left.device).split(max(1, TILE_COLUMNS // right.shape[1])):
                columns = right[others].flatten(0, 1).mT
                if room.numel() < len(rows) * columns.shape[1]:
                    room = left.new_empty(len(rows) * columns.shape[1])
                blocks = _product(rows, columns, room).view(len(some), -1, len(others), right.shape[1])
                scores[some[:, None], others] = torch.linalg.vector_norm(blocks, dim=(1, 3))
    return scores


def random_composition(d_model: int, d_head: int, *, n: int = 100, seed: int = 0) -> tuple[float, float]:
    """What `composition_scores` says of heads with random weights, `W_V W_O` and the like.

    Args:
        n: how many independent pairs are drawn, at least 2.

    Returns:
        Mean and standard deviation over pairs whose factors are Gaussian. The mean square of the score is
        `1 / d_model`.

    Raises:
        ValueError: sizes below 1, or fewer than 2 pairs.

    Cost: the QR decompositions of 2 n factors `[d_model, d_head]`.
    """
    if min(d_model, d_head) < 1:
        raise ValueError(f"d_model and d_head must be at least 1, but are {d_model} and {d_head}")
    if n < 2:
        raise ValueError(f"a spread needs at least 2 pairs, but n is {n}")
    generator = generator_of(seed)
    scores = []
    for _ in range(n):
        A1, A2 = torch.randn(2, 1, d_model, d_head, generator=generator, dtype=torch.float32)
        B1, B2 = torch.randn(2, 1, d_head, d_model, generator=generator, dtype=torch.float32)
        scores.append(float(composition_scores(A1, B1, A2, B2)))
    found = torch.tensor(scores, dtype=torch.double)
    return float(found.mean()), float(found.std())


def _factors(circuit: Factored) -> tuple[Float[Tensor, "row inner"], Float[Tensor, "inner column"]]:
    """The thin factors, in float32 at least."""
    if not isinstance(circuit, Factored):
        raise TypeError(f"circuit must be a Circuit or a FactoredMatrix, but is {circuit!r:.80}")
    A, B = circuit.A, circuit.B
    if A.ndim != 2 or B.ndim != 2 or A.shape[1] != B.shape[0]:
        raise ValueError(
            f"a circuit is a product [row, inner] @ [inner, column], but A is {tuple(A.shape)} and B is "
            f"{tuple(B.shape)}: of a stack of circuits take one"
        )
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError("a circuit must be finite, but its factors hold nan or infinity")
    return _wide(A), _wide(B)


def _square(
    circuit: Factored, over: str | None
) -> tuple[Float[Tensor, "token inner"], Float[Tensor, "inner token"]]:
    """The factors of a square circuit, transposed where its first axis is to lie along the columns."""
    A, B = _factors(circuit)
    if len(A) != B.shape[1]:
        raise ValueError(f"a circuit with a diagonal is square, but this one is {len(A)} x {B.shape[1]}")
    axes = tuple(getattr(circuit, "axes", AXES))
    if over is not None and over not in axes:
        raise ValueError(f"over must be an axis of the circuit, {axes[0]!r} or {axes[1]!r}, but is {over!r}")
    return (B.mT, A.mT) if over == axes[0] else (A, B)


def _wide(weights: Tensor) -> Tensor:
    """In float32 at least: rounded entries tie."""
    return weights.detach().to(torch.promote_types(weights.dtype, torch.float32))


def _ids(what: str, given: Tensor | Sequence[int], count: int) -> Int[Tensor, " id"]:
    """Indices from 0, checked; any of them may come twice."""
    ids = torch.as_tensor(given)
    if ids.ndim != 1:
        raise ValueError(f"{what}s must be a list of ids, but have shape {tuple(ids.shape)}")
    if len(ids) == 0:
        return ids.long()
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{what}s must be integers, but are {ids.dtype}")
    wrong = ids[(ids < 0) | (ids >= count)]
    if len(wrong):
        raise ValueError(f"{what}s must lie between 0 and {count - 1}, but there is {int(wrong[0])}")
    return ids.long()


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _room(like: Tensor) -> Float[Tensor, " entry"]:
    """Memory for one tile, to be used again for each: fresh memory for every tile would cost more than it."""
    return like.new_empty(TILE_ROWS * TILE_COLUMNS)


def _product(
    rows: Float[Tensor, "row inner"], columns: Float[Tensor, "inner column"], room: Float[Tensor, " entry"]
) -> Float[Tensor, "row column"]:
    """`rows @ columns`, in `room`."""
    size = len(rows), columns.shape[1]
    return torch.mm(rows, columns, out=room[: size[0] * size[1]].view(size))


def _triangle(matrices: Float[Tensor, "*batch row column"]) -> Float[Tensor, "*batch small column"]:
    return torch.linalg.qr(matrices, mode="r").R


def _of_norm_1(matrices: Float[Tensor, "batch row column"]) -> Float[Tensor, "batch row column"]:
    """Divided by their Frobenius norms; nan where that is zero."""
    return matrices / torch.linalg.matrix_norm(matrices)[:, None, None]
