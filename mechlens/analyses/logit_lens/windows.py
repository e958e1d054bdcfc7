"""The windows that a lens runs, for rows of unequal length or longer than the context."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import MAX_POSITIONS
from mechlens.models.run.properties import reads_alike_in
from mechlens.models.run.user_hooks import user_hooks
from mechlens.text.batches import Batch, Pieces

RESIDUAL_BYTES = 256 * 2**20
"""Memory for the residual vectors of one part; a single window may need more."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Some of the pieces, and the positions read in them."""

    tokens: Int[Tensor, "piece width"]
    piece: Int[Tensor, " here"]
    """Row of `tokens`, for each position read."""
    offset: Int[Tensor, " here"]
    batch: Int[Tensor, " here"]
    """Row of the batch that the position belongs to."""
    pos: Int[Tensor, " here"]
    cell: Int[Tensor, " here"]
    """Its index in the flattened `[batch, read]`."""


def window_parts(
    model: LensModel, batch: Batch, pieces: Pieces, read: Sequence[int], *, vector_size: int
) -> Iterator[Part]:
    """As many pieces at a time as fit in one forward pass and `RESIDUAL_BYTES`.

    Raises:
        ValueError: the positions contain only padding.
    """
    columns = torch.tensor(read)
    row, column = batch.mask[:, columns].nonzero(as_tuple=True)
    if not len(row):
        raise ValueError("positions contains only padding")
    pos = columns[column]
    piece, offset = pieces.piece[row, pos], pieces.offset[row, pos]
    for together, width in _runs(model, pieces, piece, offset):
        at_once = max(1, min(MAX_POSITIONS, RESIDUAL_BYTES // (4 * vector_size)) // width)
        for some in together.split(at_once):
            here = torch.isin(piece, some).nonzero()[:, 0]
            yield Part(
                pieces.tokens[some, :width],
                torch.searchsorted(some, piece[here]),
                offset[here],
                row[here],
                pos[here],
                row[here] * len(read) + column[here],
            )


def _runs(
    model: LensModel, pieces: Pieces, piece: Int[Tensor, " here"], offset: Int[Tensor, " here"]
) -> list[tuple[Int[Tensor, " some"], int]]:
    """The pieces that run together, and their width.

    If later tokens do not affect earlier ones in this model, shorter pieces are padded, and tokens after the
    last position read are left out.
    """
    used, lengths = piece.unique(), pieces.lengths
    deepest = int(offset.max()) + 1
    width = int(lengths[used].max())
    if not user_hooks(model):
        shortest = used[lengths[used].argmin()]
        # trying one piece takes as long as running it
        padded = len(used) > 1 and reads_alike_in(model, pieces.tokens[shortest, : lengths[shortest]], width)
        if len(used) == 1 or (padded and deepest == width):
            return [(used, width)]
        longest = used[lengths[used].argmax()]
        if padded and reads_alike_in(model, pieces.tokens[longest, :deepest], width):
            return [(used, deepest)]
    return [(used[lengths[used] == length], int(length)) for length in lengths[used].unique()]
