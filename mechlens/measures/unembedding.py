"""The one way from vectors after the last norm to the vocabulary.

Logits are made in tiles, many vectors by some of the tokens: the shape at which the product with `W_U` is
fastest, and small enough for a tile to stay near the processor while it is reduced.
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
"""Vectors that go through `W_U` together."""
TILE_COLUMNS = 1024
"""Tokens of a tile on a CPU. Wider ones halve the product's speed where there are few vectors."""
GPU_TILE_COLUMNS = 16384
"""The same on a GPU, which fills up with larger products only."""


@dataclasses.dataclass(frozen=True, eq=False)
class Unembedding:
    """From vectors after the last norm to logits, in float32 at least: rounded logits tie."""

    W_U: Float[Tensor, "d_model d_vocab"]
    """In any dtype. A narrow one is widened a tile at a time."""
    b_U: Float[Tensor, " d_vocab"]
    soft_cap: float | None = None
    """c where the model's logits are `c * tanh(logit / c)`."""

    @property
    def d_vocab(self) -> int:
        return self.W_U.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.promote_types(self.W_U.dtype, torch.float32)

    @cached_property
    def _bias(self) -> Float[Tensor, " d_vocab"] | None:
        """None where it is zero, which saves a pass over the logits."""
        return self.b_U.to(self.dtype) if bool(self.b_U.any()) else None

    @cached_property
    def excludes(self) -> bool:
        """Whether some token can never come, by a bias of minus infinity."""
        return bool(self.b_U.isneginf().any())

    @property
    def width(self) -> int:
        """How many tokens make a tile."""
        return min(self.d_vocab, TILE_COLUMNS if self.W_U.device.type == "cpu" else GPU_TILE_COLUMNS)

    def tiles(
        self, vectors: Float[Tensor, "row d_model"], width: int | None = None
    ) -> Iterator[tuple[slice, Float[Tensor, "row some"]]]:
        """The logits of some tokens after the other, and which tokens these are.

        A tile may be written to, and is overwritten by the next one. To be called without gradients.
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
        """All logits of some vectors; how many of these are held at once is up to the caller. A gradient may
        be taken of them."""
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
        """`c * tanh(logit / c)`; None leaves them."""
        return logits if self.soft_cap is None else self.soft_cap * (logits / self.soft_cap).tanh()

    def cap_slope(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """The derivative of the soft-cap where it gives these logits: `1 - (logit / c)^2`."""
        return torch.ones_like(logits) if self.soft_cap is None else 1 - (logits / self.soft_cap) ** 2

    def of(self, vectors: Float[Tensor, "row d_model"], tokens: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """The logit of one token per vector; no others are made. A gradient may be taken of it."""
        columns = self.W_U.index_select(1, tokens).T.to(self.dtype)
        logits = torch.linalg.vecdot(vectors.to(self.dtype), columns) + self.b_U[tokens].to(self.dtype)
        return self.capped(logits)

    @torch.no_grad()
    def of_each(
        self, vectors: Float[Tensor, "row d_model"], tokens: Int[Tensor, " token"]
    ) -> Float[Tensor, "row token"]:
        """The logits of some tokens for every vector, by the kind of product that `tiles` makes: so that
        tokens with the same weights have the same logit where the processor rounds all columns alike."""
        columns = self.W_U.index_select(1, tokens).to(self.dtype)
        logits = torch.addmm(self.b_U[tokens].to(self.dtype), vectors.to(self.dtype), columns)
        return self._capped_in_place(logits)

    def log_prob(
        self, vectors: Float[Tensor, "row d_model"], tokens: Int[Tensor, " row"]
    ) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
        """Log-probability of one token per vector, and whether it is the most likely one.

        Returns:
            Log-probability in nats, in float32, of which a gradient may be taken where the vectors have one;
            and whether no logit is strictly larger (rank 1).

        Cost: one product with `W_U`; no more than a tile of logits exists at any time, all of them where a
        gradient is taken.
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
        """The mean column of `W_U` under each vector's distribution, and the log of the sum of exponentials.

        The mean is the gradient of that log by the vector, and all that a cross-entropy needs of a
        distribution: the sum over tokens of p(token) times another vector's logit is a product of two vectors
        of d_model, and a product with `b_U` that is the same for all vectors.

        Args:
            n_tiles: of the vocabulary, which is cut there; None reads all of it.

        Returns:
            The mean in the dtype of logits, the log in float64.

        Raises:
            ValueError: there is a soft-cap, after which logits are not linear in the vector.

        Cost: two products with `W_U` and one exponential for each logit, of which no more than a tile exists.
        """
        if self.soft_cap is not None:
            raise ValueError("with a soft-cap no mean column is a gradient")
        mean = torch.zeros_like(vectors, dtype=self.dtype)
        running = LogSumExp(len(vectors), mean)
        for tokens, tile in islice(self.tiles(vectors), n_tiles):
            if self.excludes:
                tile.clamp_(min=torch.finfo(tile.dtype).min / 2)
            terms, growth = running.add(tile)
            # numbers below the normal ones halve the product's speed, and add nothing
            torch.threshold_(terms, 1e-30, 0.0)
            mean.mul_((-growth).exp()[:, None]).addmm_(terms, self.W_U[:, tokens].to(self.dtype).T)
        return mean.div_(running.sum.to(self.dtype)[:, None]), running.total()

    @torch.no_grad()
    def most_likely(self, vectors: Float[Tensor, "row d_model"]) -> Int[Tensor, " row"]:
        """The token with the largest logit, of equal ones the first.

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
    """The logarithm of a sum of exponentials whose terms come in tiles."""

    def __init__(self, rows: int, like: Tensor) -> None:
        self.largest = like.new_full((rows,), -torch.inf)
        """The largest term of each row so far."""
        self.sum = like.new_zeros(rows, dtype=torch.double)
        """Of the exponentials, each divided by that of the largest."""

    def add(
        self, tile: Float[Tensor, "row some"], *, largest: Tensor | None = None, out: Tensor | None = None
    ) -> tuple[Float[Tensor, "row some"], Float[Tensor, " row"]]:
        """Add a tile, of which the largest term of its row is subtracted in place.

        Args:
            largest: of each row of the tile, where somebody knows it.
            out: memory for the exponentials; None overwrites the tile.

        Returns:
            The exponentials, and by how much the largest term has grown.
        """
        before = self.largest
        self.largest = torch.maximum(before, tile.amax(1) if largest is None else largest)
        tile -= self.largest[:, None]
        growth = self.largest - before
        terms = torch.exp(tile, out=tile if out is None else out)
        self.sum = self.sum * (-growth).exp() + terms.sum(1)
        return terms, growth

    def total(self) -> Float[Tensor, " row"]:
        """In float64."""
        return self.largest + self.sum.log()


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
