"""The one path from vectors after the last norm to logits.

Logits are computed in tiles of many vectors by some tokens. This shape makes the product with `W_U` fastest
and keeps a tile in the processor's cache while it is reduced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from itertools import islice

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TILE_ROWS = 1024
"""Vectors in one product with `W_U`."""
TILE_COLUMNS = 1024
"""Tokens in a tile on a CPU. With few vectors, wider tiles halve the speed."""
GPU_TILE_COLUMNS = 16384
"""Tokens in a tile on a GPU, which needs larger products to be fully used."""


@dataclasses.dataclass(frozen=True, eq=False)
class Unembedding:
    """The map from vectors after the last norm to logits, in float32 or wider to avoid ties from rounding."""

    W_U: Float[Tensor, "d_model d_vocab"]
    """In any dtype; a narrow one is widened one tile at a time."""
    b_U: Float[Tensor, " d_vocab"]
    soft_cap: float | None = None
    """c, if the model's logits are `c * tanh(logit / c)`."""

    @property
    def d_vocab(self) -> int:
        return self.W_U.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return torch.promote_types(self.W_U.dtype, torch.float32)

    @cached_property
    def _bias(self) -> Float[Tensor, " d_vocab"] | None:
        """None if all zeros, which saves a pass over the logits."""
        return self.b_U.to(self.dtype) if bool(self.b_U.any()) else None

    @cached_property
    def excludes(self) -> bool:
        """Whether a bias of -inf excludes some token."""
        return bool(self.b_U.isneginf().any())

    @property
    def width(self) -> int:
        """Tokens in a tile."""
        return min(self.d_vocab, TILE_COLUMNS if self.W_U.device.type == "cpu" else GPU_TILE_COLUMNS)

    def tiles(
        self, vectors: Float[Tensor, "row d_model"], width: int | None = None
    ) -> Iterator[tuple[slice, Float[Tensor, "row some"]]]:
        """Yield the logits of some tokens at a time, with the slice of those tokens.

        A tile may be modified, and the next one overwrites it. Not for use with gradients.
        """
        wide, rows = vectors.to(self.dtype), len(vectors)
        width = self.width if width is None else width
        room = wide.new_empty(rows * width)
        for start in range(0, self.d_vocab, width):
            tokens = slice(start, min(start + width, self.d_vocab))
            size = rows, tokens.stop - start
            W = self.W_U[:, tokens].to(self.dtype)
            tile = torch.mm(wide, W, out=room[: size[0] * size[1]].view(size))
            if self._bias is not None:
                tile += self._bias[tokens]
            yield tokens, self._capped_in_place(tile)

    def _capped_in_place(self, logits: Float[Tensor, "row some"]) -> Float[Tensor, "row some"]:
        if self.soft_cap is None:
            return logits
        return logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)

    def logits(self, vectors: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        """All logits of some vectors; differentiable. Keep the number of vectors small."""
        if torch.is_grad_enabled() and vectors.requires_grad:
            logits = torch.addmm(self.b_U.to(self.dtype), vectors.to(self.dtype), self.W_U.to(self.dtype))
            return self.capped(logits)
        with torch.no_grad():
            whole = torch.empty(len(vectors), self.d_vocab, dtype=self.dtype, device=self.W_U.device)
            for rows in _slices(len(vectors), TILE_ROWS):
                for tokens, tile in self.tiles(vectors[rows]):
                    whole[rows, tokens] = tile
        return whole

    def capped(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """`c * tanh(logit / c)`; the logits themselves without a soft-cap."""
        return logits if self.soft_cap is None else self.soft_cap * (logits / self.soft_cap).tanh()

    def cap_slope(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """The derivative of the soft-cap where its output is `logits`: `1 - (logit / c)^2`."""
        return torch.ones_like(logits) if self.soft_cap is None else 1 - (logits / self.soft_cap) ** 2

    def of(self, vectors: Float[Tensor, "row d_model"], tokens: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """The logit of one token per vector, without computing the others; differentiable."""
        columns = self.W_U.index_select(1, tokens).T.to(self.dtype)
        logits = torch.linalg.vecdot(vectors.to(self.dtype), columns) + self.b_U[tokens].to(self.dtype)
        return self.capped(logits)

    @torch.no_grad()
    def of_each(
        self, vectors: Float[Tensor, "row d_model"], tokens: Int[Tensor, " token"]
    ) -> Float[Tensor, "row token"]:
        """The logits of some tokens for every vector.

        Computed by the same kind of product as in `tiles`, so that tokens with equal weights get equal logits
        if the processor rounds all columns alike.
        """
        columns = self.W_U.index_select(1, tokens).to(self.dtype)
        logits = torch.addmm(self.b_U[tokens].to(self.dtype), vectors.to(self.dtype), columns)
        return self._capped_in_place(logits)

    def log_prob(
        self, vectors: Float[Tensor, "row d_model"], tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
        """Log probability of one token per vector, and whether it is the most likely one.

        Returns:
            Log probability in nats, in float32, with a gradient if the vectors have one; and whether no logit
            is strictly larger (rank 1).

        Cost: one product with `W_U`. One tile of logits exists at a time; with a gradient, all logits do.
        """
        if torch.is_grad_enabled() and vectors.requires_grad:
            logits = self.logits(vectors)
            own = logits.gather(1, tokens[:, None])[:, 0]
            return (own - logits.logsumexp(1)).float(), own.detach() == logits.detach().amax(1)
        with torch.no_grad():
            own = torch.empty(len(vectors), dtype=self.dtype, device=vectors.device)
            total, largest = torch.empty_like(own, dtype=torch.double), torch.empty_like(own)
            for rows in _slices(len(vectors), TILE_ROWS):
                running = LogSumExp(len(vectors[rows]), own)
                for columns, tile in self.tiles(vectors[rows]):
                    place = tokens[rows] - columns.start
                    here = ((place >= 0) & (place < tile.shape[1])).nonzero()[:, 0]
                    own[rows][here] = tile[here, place[here]]
                    running.add(tile)
                total[rows], largest[rows] = running.total(), running.largest
            return (own - total).float(), own == largest

    @torch.no_grad()
    def expected_column(
        self, vectors: Float[Tensor, "row d_model"], *, n_tiles: int | None = None
    ) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"]]:
        """The mean column of `W_U` under each vector's distribution, and the log-sum-exp of its logits.

        The mean column is the gradient of the log-sum-exp with respect to the vector. It is also all that a
        cross-entropy needs to know of a distribution p: the mean under p of another vector's logit is that
        vector's dot product with the mean column, plus a mean of `b_U` that is the same for all vectors.

        Args:
            n_tiles: read only this many tiles of the vocabulary; None reads all of them.

        Returns:
            The mean in the logits' dtype, the log-sum-exp in float64.

        Raises:
            ValueError: there is a soft-cap, so logits are not linear in the vector.

        Cost: two products with `W_U` and one exponential per logit. One tile of logits exists at a time.
        """
        if self.soft_cap is not None:
            raise ValueError("with a soft-cap, the mean column is not a gradient")
        mean = torch.zeros_like(vectors, dtype=self.dtype)
        running = LogSumExp(len(vectors), mean)
        for tokens, tile in islice(self.tiles(vectors), n_tiles):
            if self.excludes:
                tile.clamp_(min=torch.finfo(tile.dtype).min / 2)
            terms, growth = running.add(tile)
            # subnormal numbers halve the product's speed and add nothing
            torch.threshold_(terms, 1e-30, 0.0)
            mean.mul_((-growth).exp()[:, None]).addmm_(terms, self.W_U[:, tokens].to(self.dtype).T)
        return mean.div_(running.sum.to(self.dtype)[:, None]), running.total()

    @torch.no_grad()
    def most_likely(self, vectors: Float[Tensor, "row d_model"]) -> Int[Tensor, " row"]:
        """The token with the largest logit; the first one if several tie.

        Cost: one product with `W_U`.
        """
        found = torch.empty(len(vectors), dtype=torch.long, device=vectors.device)
        for rows in _slices(len(vectors), TILE_ROWS):
            best = torch.full((len(vectors[rows]),), -torch.inf, dtype=self.dtype, device=vectors.device)
            first = torch.zeros_like(found[rows])
            for tokens, tile in self.tiles(vectors[rows]):
                values, at = tile.max(1)
                better = values > best
                best, first = best.where(~better, values), first.where(~better, at + tokens.start)
            found[rows] = first
        return found


class LogSumExp:
    """The log-sum-exp of terms that arrive in tiles."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self.largest = like.new_full((rows,), -torch.inf)
        """The largest term of each row so far."""
        self.sum = like.new_zeros(rows, dtype=torch.double)
        """The sum of exp(term - largest)."""

    def add(
        self, tile: Float[Tensor, "row some"], *, largest: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Float[Tensor, "row some"], Float[Tensor, " row"]]:
        """Add a tile, subtracting the largest term so far from it in place.

        Args:
            largest: the largest term of each row of the tile, if known.
            out: memory for the exponentials; None overwrites the tile.

        Returns:
            The exponentials, and by how much each row's largest term has grown.
        """
        before = self.largest
        self.largest = torch.maximum(before, tile.amax(1) if largest is None else largest)
        tile -= self.largest[:, None]
        growth = self.largest - before
        terms = torch.exp(tile, out=tile if out is None else out)
        self.sum = self.sum * (-growth).exp() + terms.sum(1)
        return terms, growth

    def total(self) -> Float[Tensor, " row"]:
        """The log-sum-exp so far, in float64."""
        return self.largest + self.sum.log()


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
