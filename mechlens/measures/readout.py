"""Statistics of next-token distributions, computed without holding all logits."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.arguments import check_counts, whole_number
from mechlens.measures.divergence import kl
from mechlens.measures.memory import is_out_of_memory
from mechlens.measures.unembedding import TILE_ROWS, LogSumExp, Unembedding

STATISTICS = ("entropy", "kl", "log_prob", "rank")
"""The statistics besides the most likely tokens."""
CPU_BUDGET, GPU_BUDGET = 64 * 2**20, 2**30
GROUP = 64
"""Tokens in a group; its largest logit tells whether the group can contain one of the most likely tokens."""

Decode = Callable[[int, Float[Tensor, "1 pos d_model"]], Float[Tensor, "1 pos d_model"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Readout:
    """Statistics of rows of residual vectors; those not requested are None."""

    top_ids: Int[Tensor, "row pos k"]
    """The most likely tokens, in descending order."""
    top_probabilities: Float[Tensor, "row pos k"]
    entropy: Float[Tensor, "row pos"] | None
    """Nats."""
    kl: Float[Tensor, "row pos reference"] | None
    """KL(reference row || row) in nats."""
    log_prob: Float[Tensor, "row pos target"] | None
    """Log probability of the targets in nats. With references, the first target is the first reference's top
    token."""
    rank: Int[Tensor, "row pos target"] | None
    """Rank of the targets: 1 plus the number of strictly larger logits."""


def read_out(
    vectors: Float[Tensor, "row pos d_model"],
    unembedding: Unembedding,
    *,
    targets: Int[Tensor, "pos target"],
    references: Sequence[int] = (),
    top_k: int = 5,
    statistics: Collection[str] = STATISTICS,
    decode: Decode | None = None,
    memory_budget: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> Readout:
    """Reduce residual vectors to statistics of their next-token distributions.

    Args:
        vectors: one row per layer (or per item to compare), with the same positions in each.
        targets: the tokens at each position whose rank and log probability are computed.
        references: rows that all rows are compared with. The top token of the first reference becomes the
            first target.
        top_k: number of most likely tokens to keep, at least 1.
        statistics: the `STATISTICS` to compute.
        decode: `(row, vectors [1, pos, d_model]) -> vectors`, applied before the unembedding, such as a
            norm. It is called once for each row and block of positions.
        memory_budget: bytes for logits and temporaries; None means 64 MiB, or 1 GiB on a GPU. It is halved
            when memory runs out, and exceeded if one position does not fit.
        advance: called after each block with its number of positions.

    Returns:
        Statistics in float32. A token with a logit of -inf has probability 0 (log probability -inf) and adds
        nothing.

    Raises:
        ValueError: a budget below 1 byte, or a `top_k` below 1 or above the vocabulary's size.

    References: nostalgebraist 2020, "interpreting GPT: the logit lens".
    Cost: one product with `W_U`, in tiles, and up to thirteen passes over each tile while it is in the cache.
    Memory for the references' logits at one block of positions and for two tiles, regardless of the number of
    rows.
    """
    _, n_pos, _ = vectors.shape
    d_vocab = unembedding.d_vocab
    if whole_number("top_k", top_k) not in range(1, d_vocab + 1):
        raise ValueError(f"top_k must be between 1 and the vocabulary of {d_vocab}, got {top_k}")
    if memory_budget is None:
        memory_budget = GPU_BUDGET if vectors.device.type == "cuda" else CPU_BUDGET
    check_counts(memory_budget=memory_budget)
    work = _Work(vectors, unembedding, targets, tuple(references), top_k, frozenset(statistics), decode)
    parts: list[Readout] = []
    start, at_once = 0, work.positions(memory_budget)
    # two tiles, and temporaries for the most likely tokens
    tile_bytes = max(1, memory_budget // 16)
    while start < n_pos:
        # equal blocks, so that the last one is not small
        left = n_pos - start
        where = slice(start, start + -(-left // -(-left // at_once)))
        try:
            parts.append(work.block(where, tile_bytes))
        except (RuntimeError, MemoryError) as error:
            smallest = at_once == 1 and tile_bytes < 4 * GROUP
            if not is_out_of_memory(error) or smallest:
                raise
            at_once, tile_bytes = max(1, at_once // 2), max(1, tile_bytes // 2)
            continue
        if advance is not None:
            advance(where.stop - start)
        start = where.stop
    return joined(parts, dim=1)


def joined(parts: Sequence[Readout], *, dim: int) -> Readout:
    """Several readouts as one, along rows (dim 0) or positions (dim 1)."""

    def whole(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values, dim=dim)

    values: dict[str, Any] = {field.name: whole(field.name) for field in dataclasses.fields(Readout)}
    return Readout(**values)


def kl_from(
    unembedding: Unembedding,
    reference: Float[Tensor, "pos d_model"],
    vectors: Float[Tensor, "row pos d_model"],
) -> Float[Tensor, "row pos"]:
    """KL(reference || vector) in nats at each position of each row; differentiable.

    Cost: one product with `W_U`, in tiles; with a gradient, all logits at once.
    """
    if torch.is_grad_enabled() and vectors.requires_grad:
        own = unembedding.logits(reference).log_softmax(-1)
        other = unembedding.logits(vectors.flatten(0, 1)).log_softmax(-1).view(*vectors.shape[:2], -1)
        return kl(own.expand_as(other), other)
    found = read_out(
        torch.cat([reference[None], vectors]),
        unembedding,
        targets=torch.empty(len(reference), 0, dtype=torch.long, device=vectors.device),
        references=(0,),
        top_k=1,
        statistics=("kl",),
    )
    assert found.kl is not None
    return found.kl[1:, :, 0]


@dataclasses.dataclass(frozen=True, eq=False)
class _Work:
    """The vectors, and what to compute from them."""

    vectors: Float[Tensor, "row pos d_model"]
    unembedding: Unembedding
    targets: Int[Tensor, "pos target"]
    references: tuple[int, ...]
    top_k: int
    statistics: frozenset[str]
    decode: Decode | None

    def positions(self, budget: int) -> int:
        """Positions in a block, for which the references' logits are held at once."""
        if not self.references:
            return TILE_ROWS
        one = len(self.references) * self.unembedding.d_vocab * self.unembedding.dtype.itemsize
        return max(1, min(TILE_ROWS, budget * 5 // 8 // one))

    def decoded(self, rows: Sequence[int], where: slice) -> Float[Tensor, "some here d_model"]:
        some = [self.vectors[row : row + 1, where] for row in rows]
        if self.decode is not None:
            some = [self.decode(row, each) for row, each in zip(rows, some, strict=True)]
        return torch.cat(some)

    def block(self, where: slice, tile_bytes: int) -> Readout:
        """All rows at some positions."""
        wanted, n_pos = self.targets[where], where.stop - where.start
        held: _References | None = None
        found: dict[int, Readout] = {}
        if self.references:
            held = _References.of(self.unembedding, self.decoded(self.references, where))
            wanted = torch.cat([held.probabilities[0].argmax(-1, keepdim=True), wanted], dim=1)
            own = held.probabilities.gather(2, wanted.expand(len(self.references), -1, -1))
            # no product is computed here, so tiles may be wide
            width = self._width(len(own) * n_pos, tile_bytes, self.unembedding.d_vocab)
            reduced = self._reduced(held.tiles(width), wanted, own, held)
            found |= zip(self.references, _rows(reduced), strict=True)
        unique, place = wanted.unique(return_inverse=True)
        others = [row for row in range(len(self.vectors)) if row not in found]
        n_parts = min(len(others), max(1, round(len(others) * n_pos / TILE_ROWS)))
        for part in range(n_parts):
            # equal parts, because a product of few vectors is slow
            rows = others[part * len(others) // n_parts : (part + 1) * len(others) // n_parts]
            decoded = self.decoded(rows, where)
            # the targets' logits first, so that ranks can be counted tile by tile
            some = self.unembedding.of_each(decoded.flatten(0, 1), unique).view(len(rows), n_pos, -1)
            own = some.gather(2, place.expand(len(rows), -1, -1))
            width = self._width(len(rows) * n_pos, tile_bytes, self.unembedding.width)
            tiles = self.unembedding.tiles(decoded.flatten(0, 1), width)
            found |= zip(rows, _rows(self._reduced(tiles, wanted, own, held)), strict=True)
        return joined([found[row] for row in range(len(self.vectors))], dim=0)

    def _width(self, rows: int, tile_bytes: int, widest: int) -> int:
        width = min(widest, max(1, tile_bytes // (self.unembedding.dtype.itemsize * rows)))
        # whole groups, if there is room for one
        return width - width % GROUP if GROUP <= width < self.unembedding.d_vocab else width

    def _reduced(
        self,
        tiles: Iterable[tuple[slice, Float[Tensor, "row some"]]],
        wanted: Int[Tensor, "here target"],
        own: Float[Tensor, "some here target"],
        references: _References | None,
    ) -> Readout:
        """All statistics of some rows. Overwrites the tiles."""
        lowest = torch.finfo(own.dtype).min / 2
        if self.unembedding.excludes:
            # finite, because 0 * -inf is nan
            own = own.clamp(min=lowest)
        shape, n_rows = own.shape[:2], own.shape[0] * own.shape[1]
        running = LogSumExp(n_rows, own)
        top = _Top(n_rows, self.top_k, own)
        targets = _Targets(wanted, own, counted="rank" in self.statistics)
        # sums over tiles are in float64
        weighted = own.new_zeros(n_rows, dtype=torch.double)
        kl = references if "kl" in self.statistics else None
        n_references = 0 if kl is None else len(kl.probabilities)
        cross = own.new_zeros(n_references, *shape, dtype=torch.double)
        covered = own.new_zeros(n_references, shape[1], dtype=torch.double)
        room = None
        for tokens, tile in tiles:
            if self.unembedding.excludes:
                tile.clamp_(min=lowest)
            room = torch.empty_like(tile).flatten() if room is None else room
            scratch = room[: tile.numel()].view(tile.shape)
            largest = top.add(tile, tokens.start)
            targets.add(tile, tokens, scratch)
            fading = running.sum
            terms, growth = running.add(tile, largest=largest, out=scratch)
            # the first tile grows from -inf, with nothing to rescale
            growth = growth.nan_to_num(posinf=0.0) if tokens.start == 0 else growth
            if "entropy" in self.statistics or "kl" in self.statistics:
                weighted = (weighted - fading * growth) * (-growth).exp() + terms.mul_(tile).sum(1)
            if kl is not None:
                moved, by_row = growth.view(shape), tile.view(*shape, -1)
                for index, probabilities in enumerate(kl.probabilities[:, :, tokens]):
                    product = torch.mul(by_row, probabilities, out=scratch.view_as(by_row))
                    cross[index] += product.sum(-1) - covered[index] * moved
                    covered[index] += probabilities.sum(-1)
        log_sum = running.sum.log().view(shape)
        entropy = log_sum - (weighted / running.sum).view(shape)
        log_total = running.total().view(shape)
        log_prob = (targets.logits - log_total[..., None]).masked_fill(targets.logits == lowest, -torch.inf)
        if kl is not None and kl.entropy is None:
            kl.entropy = entropy
        return Readout(
            top_ids=top.ids.view(*shape, -1),
            top_probabilities=(top.values.view(*shape, -1) - log_total[..., None]).exp().float(),
            entropy=entropy.float() if "entropy" in self.statistics else None,
            kl=None if kl is None else _kl(kl.entropy, cross, log_sum),
            log_prob=log_prob.float() if "log_prob" in self.statistics else None,
            rank=1 + targets.larger.long() if "rank" in self.statistics else None,
        )


def _kl(
    entropy: Float[Tensor, "reference here"] | None,
    cross: Float[Tensor, "reference some here"],
    log_sum: Float[Tensor, "some here"],
) -> Float[Tensor, "some here reference"]:
    """Sum of p (log p - log q), with q's logits relative to its largest; clamped at 0 as in `kl`."""
    assert entropy is not None
    apart = (log_sum - cross - entropy[:, None]).clamp(min=0).float()
    return rearrange(apart, "reference some here -> some here reference")


def _rows(found: Readout) -> Iterable[Readout]:
    for row in range(len(found.top_ids)):
        parts = {field.name: getattr(found, field.name) for field in dataclasses.fields(Readout)}
        one: dict[str, Any] = {
            name: None if part is None else part[row : row + 1] for name, part in parts.items()
        }
        yield Readout(**one)


@dataclasses.dataclass(eq=False)
class _References:
    """The reference rows at some positions."""

    probabilities: Float[Tensor, "reference here d_vocab"]
    """Logits, until `tiles` has turned them into probabilities."""
    largest: Float[Tensor, "reference here 1"]
    sum: Float[Tensor, "reference here 1"]
    """The sum of exp(logit - largest). In the logits' dtype, as `largest` is: a wider one would widen all
    results."""
    entropy: Float[Tensor, "reference here"] | None = None

    @classmethod
    def of(cls, unembedding: Unembedding, vectors: Float[Tensor, "reference here d_model"]) -> _References:
        flat = vectors.flatten(0, 1)
        logits = torch.empty(
            len(flat), unembedding.d_vocab, dtype=unembedding.dtype, device=unembedding.W_U.device
        )
        running = LogSumExp(len(flat), logits)
        for tokens, tile in unembedding.tiles(flat):
            logits[:, tokens] = tile
            running.add(tile)
        shape = vectors.shape[:2]
        largest, total = running.largest, running.sum.to(logits.dtype)
        return cls(logits.view(*shape, -1), largest.view(*shape, 1), total.view(*shape, 1))

    def tiles(self, width: int) -> Iterable[tuple[slice, Float[Tensor, "row some"]]]:
        """Yield copies of the logits, tile by tile, and turn each yielded tile into probabilities."""
        room = None
        for start in range(0, self.probabilities.shape[2], width):
            some = self.probabilities[:, :, start : start + width]
            room = torch.empty(some.numel(), dtype=some.dtype, device=some.device) if room is None else room
            tile = room[: some.numel()].view(some.shape).copy_(some)
            some.sub_(self.largest).exp_().div_(self.sum)
            yield slice(start, start + tile.shape[2]), tile.flatten(0, 1)


class _Top:
    """The k largest logits of each row so far."""

    def __init__(self, rows: int, k: int, like: Tensor) -> None:
        self.values = like.new_full((rows, k), -torch.inf)
        self.ids = torch.zeros(rows, k, dtype=torch.long, device=like.device)

    def add(self, tile: Float[Tensor, "row some"], start: int) -> Float[Tensor, " row"]:
        """Add a tile, and return the largest logit of each of its rows.

        Only rows with a new top-k logit are searched, and there only the k groups of tokens with the largest
        maxima, which must contain the k largest logits.
        """
        n_rows, width = tile.shape
        k = self.values.shape[1]
        groups = tile.view(n_rows, -1, GROUP if width % GROUP == 0 else width)
        most = groups.amax(2)
        largest = most.amax(1)
        # nan compares false: this form keeps it, so that it shows
        rows = (~(largest <= self.values[:, -1])).nonzero()[:, 0]
        if len(rows):
            chosen = most[rows].topk(min(k, most.shape[1])).indices
            n_groups, size = most.shape[1], groups.shape[2]
            flat = groups.reshape(-1, size).index_select(0, (rows[:, None] * n_groups + chosen).flatten())
            values = flat.view(len(rows), -1)
            within = torch.arange(size, device=tile.device)
            ids = (start + chosen[..., None] * size + within).flatten(1)
            pool, pool_ids = torch.cat([self.values[rows], values], 1), torch.cat([self.ids[rows], ids], 1)
            best = pool.topk(k)
            self.values[rows], self.ids[rows] = best.values, pool_ids.gather(1, best.indices)
        return largest


class _Targets:
    """The targets' logits, and how many logits so far are larger."""

    def __init__(
        self, wanted: Int[Tensor, "here target"], own: Float[Tensor, "some here target"], *, counted: bool
    ) -> None:
        self.own, self.logits, self.larger = own, own.clone(), torch.zeros_like(own)
        self.n_targets, self.counted = wanted.shape[1], counted
        ids = wanted.flatten()
        self.order = ids.argsort()
        self.ids = ids[self.order].tolist()

    def add(self, tile: Float[Tensor, "row some"], tokens: slice, scratch: Tensor) -> None:
        by_row = tile.view(*self.own.shape[:2], -1)
        for index in range(self.n_targets if self.counted else 0):
            # counted in floats, which is faster than summing booleans, and exact below 2 ** 24
            torch.gt(by_row, self.own[..., index, None], out=scratch.view_as(by_row))
            self.larger[..., index] += scratch.view_as(by_row).sum(-1)
        first, last = (bisect.bisect_left(self.ids, end) for end in (tokens.start, tokens.stop))
        if first < last:
            places = self.order[first:last]
            pos, target = places // self.n_targets, places % self.n_targets
            columns = torch.tensor(self.ids[first:last], device=tile.device) - tokens.start
            logits = by_row[:, pos, columns]
            # a target is not larger than itself, however it is rounded
            self.larger[:, pos, target] -= (logits > self.own[:, pos, target]).to(self.larger.dtype)
            self.logits[:, pos, target] = logits
