"""Measures of matrices stored as a product of two thin ones, `A [row, inner] @ B [inner, column]`.

The product is never built as a whole: over GPT-2's vocabulary it would take 10 GB. It is computed in tiles
small enough to stay in the processor's cache while they are reduced.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Complex, Float, Int, Real
from torch import Tensor

from mechlens.progress import progress_bar

TILE_ROWS = 1024
TILE_COLUMNS = 1024
"""A tile takes 4 MiB in float32, a size at which product and reduction are fast. A multiple of `TILE_ROWS`,
so that the diagonal of a block of rows is in one tile."""
AXES = ("query", "key")
"""Names of the rows and columns of a circuit that does not name its axes."""


@runtime_checkable
class Factored(Protocol):
    """A matrix as a product `A @ B`: a `Circuit` or TransformerLens's `FactoredMatrix`.

    Its `axes` name its rows and columns; without them, `AXES` do.
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
    """The largest singular values and their vectors: the circuit is approximately `U @ S.diag() @ V.T`."""

    U: Float[Tensor, "row n"]
    """Orthonormal columns; the largest entry in magnitude of each is positive."""
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
    """Rank each token's entry with itself, `(i, i)`, among its entries with all tokens.

    Args:
        over: the name of the axis along which to rank. The second axis (`key`; the default, None) ranks entry
            `(i, i)` within row `i`: for each query, among all keys. The first axis (`query`) ranks it within
            column `i`: for each key, among all queries.
        tokens: ids to rank, compared with the whole vocabulary; None ranks all tokens.
        ties: how ties count: `for` the diagonal (only strictly larger entries rank above it) or `against` it
            (equal ones do, too).
        progress: show a progress bar; None shows one in a terminal and in Jupyter.

    Returns:
        One rank per token, in the order of `tokens`; 1 is the largest entry, `d_vocab` the smallest.

    Raises:
        TypeError: tokens that are not integers.
        ValueError: a circuit that is not square or not finite, an unknown axis, a token out of range, or an
            unknown value of `ties`.

    Example:
        >>> from mechlens.measures.weights import diagonal_ranks
        >>> diagonal_ranks(mechlens.full_OV(model, "L3H5"), tokens=[100, 200]).shape
        torch.Size([2])

    Cost: the product of the ranked rows with all columns, and two passes over each tile of it. Memory for a
    tile (4 MiB), and for a copy of the factors if they are narrower than float32 or `tokens` are given.
    """
    rows, columns = _square(circuit, over)
    compare = {"for": torch.gt, "against": torch.ge}.get(ties)
    if compare is None:
        raise ValueError(f"ties must be 'for' or 'against' the diagonal, got {ties!r}")
    place = None
    if tokens is not None:
        ids, place = _ids("token", tokens, len(rows)).to(rows.device).unique(return_inverse=True)
        # the columns of `tokens` come first, so that a block's diagonal is in one tile here, too
        others = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        others[ids] = False
        rows, columns = rows[ids], columns[:, torch.cat([ids, others.nonzero()[:, 0]])]
    ranks = torch.empty(len(rows), dtype=torch.long, device=rows.device)
    room = room_for_a_tile(rows)
    blocks = _slices(len(rows), TILE_ROWS)
    for block in progress_bar(blocks, desc="ranks", unit="tile", progress=progress):
        some = rows[block]
        tiles = _slices(columns.shape[1], TILE_COLUMNS)
        # the tile with the diagonal comes first and is computed only once: a second product might round its
        # entries differently and change their ranks
        home = tiles.pop(block.start // TILE_COLUMNS)
        own, rank = None, torch.full_like(ranks[block], 1 if ties == "for" else 0)
        for tile in (home, *tiles):
            # a narrow product might also round differently, so the last tile overlaps the one before
            start = max(0, min(tile.start, columns.shape[1] - TILE_COLUMNS))
            entries = product(some, columns[:, start : tile.stop], room)
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
    """The share of tokens whose entry with itself is among the k largest of its entries with all tokens.

    Args:
        k: 1 asks whether no entry is larger.
        over: the name of the axis along which to rank; None takes the second one (`key`): for each query,
            among all keys.
        tokens: ids to count, compared with the whole vocabulary; None counts all tokens.
        weights: one weight per counted token, such as its frequency; they need not sum to 1. None weights all
            tokens equally.
        ties: `for` or `against` the diagonal, as in `diagonal_ranks`.
        progress: show a progress bar; None shows one in a terminal and in Jupyter.

    Returns:
        A share in [0, 1].

    Raises:
        TypeError: tokens or k that are not integers.
        ValueError: a circuit that is not square or not finite, an unknown axis, a token or k out of range, an
            unknown value of `ties`, no tokens, or weights that are negative, not finite, all zero or not one
            per token.

    Example:
        >>> from mechlens.measures.weights import top_k_accuracy
        >>> 0 <= top_k_accuracy(mechlens.full_OV(model, "L3H5"), k=5, tokens=range(100)) <= 1
        True

    References: "How one can Interpret GPT2-Small", whose top-1 accuracy corresponds to `over="key"`.
    Cost: the product of the counted rows with all columns, and two passes over each tile of it.
    """
    d_vocab = len(_square(circuit, over)[0])
    try:
        k = operator.index(k)
    except TypeError:
        raise TypeError(f"k must be a whole number, got {k!r}") from None
    if not 1 <= k <= d_vocab:
        raise ValueError(f"k must be between 1 and the vocabulary of {d_vocab}, got {k}")
    ids = torch.arange(d_vocab) if tokens is None else _ids("token", tokens, d_vocab)
    asked = len(ids)
    if asked == 0:
        raise ValueError("an accuracy needs at least 1 token, but there is none")
    shares = torch.ones(asked, dtype=torch.float32) if weights is None else torch.as_tensor(weights)
    # on the CPU, because not every GPU has float64
    shares = shares.detach().cpu().double()
    if shares.shape != (asked,):
        raise ValueError(
            f"weights must be one for each of {asked} tokens, but have shape {tuple(shares.shape)}"
        )
    if not (shares.isfinite().all() and (shares >= 0).all() and shares.sum() > 0):
        raise ValueError("weights must be finite and not negative, and at least one must be above 0")
    hits = diagonal_ranks(circuit, over, tokens=tokens, ties=ties, progress=progress).cpu() <= k
    return float(shares[hits].sum() / shares.sum())


def largest_entries(circuit: Factored, n: int, *, progress: bool | None = None) -> Entries:
    """The n largest of all entries, in descending order; ties by row, then by column.

    Raises:
        ValueError: n out of range, or a circuit that is not finite.

    Cost: the whole product, one pass over each tile of it, and a few over rows that may contain one of the n.
    """
    A, B = _factors(circuit)
    n_columns = B.shape[1]
    if not 1 <= n <= len(A) * n_columns:
        raise ValueError(f"n must be between 1 and the circuit's {len(A)} x {n_columns} entries, got {n}")
    room = room_for_a_tile(A)
    values, places = A.new_empty(0), torch.empty(0, dtype=torch.long, device=A.device)
    lowest, last = -math.inf, len(A) * n_columns
    blocks = _slices(len(A), TILE_ROWS)
    for block in progress_bar(blocks, desc="largest entries", unit="tile", progress=progress):
        for tile in _slices(n_columns, TILE_COLUMNS):
            entries = product(A[block], B[:, tile], room)
            best = entries.amax(1)
            largest = float(best.max())
            if largest < lowest or (largest == lowest and block.start * n_columns + tile.start > last):
                continue
            # usually only one or two rows have an entry that is large enough
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
    """One row of a circuit: a query with all keys, or a source with all destinations."""
    return corner(circuit, [index], None)[0]


def column(circuit: Factored, index: int) -> Float[Tensor, " row"]:
    """One column of a circuit: a key with all queries, or a destination with all sources."""
    return corner(circuit, None, [index])[:, 0]


def corner(
    circuit: Factored,
    rows: Int[Tensor, " row"] | Sequence[int] | None,
    columns: Int[Tensor, " column"] | Sequence[int] | None,
) -> Float[Tensor, "row column"]:
    """The entries of some rows with some columns, in the given order; None takes all.

    Raises:
        TypeError: rows or columns that are not integers.
        ValueError: one of them is out of range.

    Cost: memory for all requested entries; keep them few.
    """
    A, B = _factors(circuit)
    if rows is not None:
        A = A[_ids("row", rows, len(A)).to(A.device)]
    if columns is not None:
        B = B[:, _ids("column", columns, B.shape[1]).to(B.device)]
    return A @ B


def singular(circuit: Factored, n: int) -> Singular:
    """The n largest singular values of a circuit, and their vectors.

    Raises:
        ValueError: n below 1 or above the smallest dimension (rows, columns, inner), or a circuit that is
            not finite.

    Cost: QR decompositions of the thin factors and the SVD of an `[inner, inner]` matrix.
    """
    A, B = _factors(circuit)
    most = min(*A.shape, B.shape[1])
    if not 1 <= n <= most:
        raise ValueError(f"n must be between 1 and {most}, the most that can differ from 0, got {n}")
    left, left_R = torch.linalg.qr(A)
    right, right_R = torch.linalg.qr(B.mT)
    U, S, Vh = torch.linalg.svd(left_R @ right_R.mT)
    U, V = left @ U[:, :n], right @ Vh[:n].mT
    # a pair of singular vectors is defined up to a common sign
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return Singular(U * sign, S[:n], V * sign)


def eigenvalues(circuit: Factored) -> Complex[Tensor, " eigenvalue"]:
    """The eigenvalues of a circuit that can differ from 0, in descending magnitude.

    Returns:
        As many as the inner dimension or the vocabulary, whichever is smaller.

    Raises:
        ValueError: a circuit that is not square or not finite.

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    Cost: the eigenvalues of `B @ A`, `[inner, inner]`, which are those of `A @ B` up to zeros.
    """
    A, B = _square(circuit, None)
    small = B @ A if A.shape[1] <= len(A) else A @ B
    # on the CPU, because not every build of PyTorch has this on a GPU
    found = torch.linalg.eigvals(small.cpu())
    return found[found.abs().argsort(descending=True, stable=True)].to(A.device)


def eigenvalue_copying_score(circuit: Factored) -> float:
    """How positive a circuit's eigenvalues are (a copying circuit's are positive): `Σ Re λ / Σ |λ|`.

    Returns:
        In [-1, 1]: 1 if all are real and positive. nan if all are zero up to rounding.

    Raises:
        ValueError: a circuit that is not square or not finite.

    Example:
        >>> from mechlens.measures.weights import eigenvalue_copying_score
        >>> -1 <= eigenvalue_copying_score(mechlens.full_OV(model, "L3H5")) <= 1
        True

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", whose `Σ λ / Σ |λ|`
    is the same, because complex eigenvalues come in conjugate pairs.
    Cost: the eigenvalues of an `[inner, inner]` matrix.
    """
    A, B = _factors(circuit)
    found = eigenvalues(circuit)
    total = float(found.abs().sum())
    if total <= torch.finfo(A.dtype).eps * float(A.norm() * B.norm()):
        return math.nan
    return max(-1.0, min(1.0, float(found.real.sum()) / total))


def _factors(circuit: Factored) -> tuple[Float[Tensor, "row inner"], Float[Tensor, "inner column"]]:
    """The thin factors, in float32 or wider."""
    if not isinstance(circuit, Factored):
        raise TypeError(f"circuit must be a Circuit or a FactoredMatrix, got {circuit!r:.80}")
    A, B = circuit.A, circuit.B
    if A.ndim != 2 or B.ndim != 2 or A.shape[1] != B.shape[0]:
        raise ValueError(
            f"a circuit must be a product [row, inner] @ [inner, column], but A is {tuple(A.shape)} and B is "
            f"{tuple(B.shape)}: take one circuit of a stack"
        )
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError("a circuit must be finite, but its factors contain nan or infinity")
    return wide(A), wide(B)


def _square(
    circuit: Factored, over: str | None
) -> tuple[Float[Tensor, "token inner"], Float[Tensor, "inner token"]]:
    """The factors of a square circuit, transposed if `over` is its first axis."""
    A, B = _factors(circuit)
    if len(A) != B.shape[1]:
        raise ValueError(f"the circuit must be square, got {len(A)} x {B.shape[1]}")
    axes = tuple(getattr(circuit, "axes", AXES))
    if over is not None and over not in axes:
        raise ValueError(f"over must be an axis of the circuit, {axes[0]!r} or {axes[1]!r}, got {over!r}")
    return (B.mT, A.mT) if over == axes[0] else (A, B)


def wide(weights: Tensor) -> Tensor:
    """In float32 or wider, to avoid ties from rounding."""
    return weights.detach().to(torch.promote_types(weights.dtype, torch.float32))


def _ids(what: str, given: Tensor | Sequence[int], count: int) -> Int[Tensor, " id"]:
    """Checked indices from 0; duplicates are allowed."""
    ids = torch.as_tensor(given)
    if ids.ndim != 1:
        raise ValueError(f"{what}s must be a list of ids, but have shape {tuple(ids.shape)}")
    if len(ids) == 0:
        return ids.long()
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{what}s must be integers, got {ids.dtype}")
    wrong = ids[(ids < 0) | (ids >= count)]
    if len(wrong):
        raise ValueError(f"{what}s must be between 0 and {count - 1}, but there is {int(wrong[0])}")
    return ids.long()


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def room_for_a_tile(like: Tensor) -> Float[Tensor, " entry"]:
    """Memory for one tile, reused for each: allocating every tile would take longer than computing it."""
    return like.new_empty(TILE_ROWS * TILE_COLUMNS)


def product(
    rows: Float[Tensor, "row inner"], columns: Float[Tensor, "inner column"], room: Float[Tensor, " entry"]
) -> Float[Tensor, "row column"]:
    """`rows @ columns`, in `room`."""
    size = len(rows), columns.shape[1]
    return torch.mm(rows, columns, out=room[: size[0] * size[1]].view(size))
