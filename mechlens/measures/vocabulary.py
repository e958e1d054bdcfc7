"""The streaming readout: residual vectors against the whole vocabulary, a chunk at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.measures.memory import is_out_of_memory

CHUNK_BYTES = 16 * 2**20
"""Memory for one chunk of float32 logits; small enough to stay near the processor while it is reduced."""
TILE_ROWS = 1024
TILE_BYTES = 4 * 2**20
"""The same where a chunk need not be whole distributions: the shape at which the product is fastest."""


def target_log_prob(
    vectors: Float[Tensor, "row d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    b_U: Float[Tensor, " d_vocab"],
    targets: Int[Tensor, " row"],
    *,
    soft_cap: float | None = None,
) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
    """Log-probability of one target per vector, and whether it is the most likely token.

    Args:
        vectors: after the final norm.
        soft_cap: c where the model's logits are `c * tanh(logit / c)`.

    Returns:
        Log-probability in nats, in float32, and whether no logit is strictly larger (rank 1).

    Cost: one product with `W_U` (and a float32 copy of a narrower one); no more than a chunk of rows has
    its logits at any time.
    """
    W_U, b_U = _wide(W_U), _wide(b_U)
    n_rows, width = len(vectors), max(1, TILE_BYTES // (4 * TILE_ROWS))
    own = vectors.new_empty(n_rows, dtype=W_U.dtype)
    totals, largest = own.new_empty(n_rows), own.new_empty(n_rows)
    for rows in torch.arange(n_rows, device=vectors.device).split(TILE_ROWS):
        some = vectors[rows]
        ends, tops = [], []
        for first in range(0, W_U.shape[1], width):
            columns = slice(first, first + width)
            logits = project(some, W_U[:, columns], b_U[columns], soft_cap)
            ends.append(logits.logsumexp(1))
            tops.append(logits.amax(1))
            place = targets[rows] - first
            here = (place >= 0) & (place < logits.shape[1])
            own[rows[here]] = logits[here, place[here]]
        totals[rows] = torch.stack(ends).logsumexp(0)
        largest[rows] = torch.stack(tops).amax(0)
    return (own - totals).float(), own == largest


def _wide(weights: Tensor) -> Tensor:
    """In float32 at least: rounded logits tie, and a tie counts as the most likely token."""
    return weights.to(torch.promote_types(weights.dtype, torch.float32))


def project(
    vectors: Float[Tensor, "row d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    b_U: Float[Tensor, " d_vocab"],
    soft_cap: float | None,
) -> Float[Tensor, "row d_vocab"]:
    """In the precision of `W_U`."""
    return capped(torch.addmm(b_U, vectors.to(W_U.dtype), W_U), soft_cap)


def capped(logits: Float[Tensor, "*any"], soft_cap: float | None) -> Float[Tensor, "*any"]:
    """`c * tanh(logit / c)`; None leaves them."""
    return logits if soft_cap is None else soft_cap * (logits / soft_cap).tanh()


@dataclasses.dataclass(frozen=True, eq=False)
class Readout:
    """What rows of residual vectors say about the next token, without their distributions."""

    top_ids: Int[Tensor, "row pos k"]
    """The most likely tokens, the likeliest first."""
    top_probabilities: Float[Tensor, "row pos k"]
    entropy: Float[Tensor, "row pos"]
    """Nats."""
    kl: Float[Tensor, "reference row pos"]
    """KL(reference row || row) in nats."""
    log_prob: Float[Tensor, "row pos target"]
    """Of the targets, in nats; the first is the top token of the first reference row."""
    rank: Int[Tensor, "row pos target"]
    """Of the targets; 1 is the most likely, ties count strictly larger logits."""

    def without_first(self, count: int) -> Readout:
        """The same of all rows but the first `count`."""
        return Readout(
            top_ids=self.top_ids[count:],
            top_probabilities=self.top_probabilities[count:],
            entropy=self.entropy[count:],
            kl=self.kl[:, count:],
            log_prob=self.log_prob[count:],
            rank=self.rank[count:],
        )


def read_out(
    vectors: Float[Tensor, "row pos d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    b_U: Float[Tensor, " d_vocab"],
    *,
    targets: Int[Tensor, "pos target"],
    references: Sequence[int],
    top_k: int = 5,
    soft_cap: float | None = None,
    decode: Callable[[int, Tensor], Tensor] | None = None,
    chunk_bytes: int | None = None,
) -> Readout:
    """Reduce residual vectors to statistics of their next-token distributions.

    Args:
        vectors: one row per layer (or whatever is compared), the same positions in each.
        targets: tokens whose rank and log-probability are wanted at each position.
        references: rows that all rows are compared with; the top token of the first of them becomes
            the first target.
        top_k: how many of the most likely tokens to keep, at least 1.
        soft_cap: c where the model's logits are `c * tanh(logit / c)`.
        decode: `(row, vectors [1, pos, d_model]) -> vectors` before the unembedding, such as a norm.
        chunk_bytes: memory for the logits of one chunk; None takes `CHUNK_BYTES`. A chunk is never less
            than the references and one other row at one position.

    Returns:
        Statistics in float32. A token with a logit of -inf has probability 0 (log-probability -inf) and adds
        nothing.

    Raises:
        ValueError: no reference, a budget below 1 byte, or a `top_k` that the vocabulary does not have.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens".
    Cost: one product with `W_U` and about ten passes over each chunk of logits, while it is in the
    cache; memory for three chunks, however many rows there are. Where memory runs out all the same, chunks
    are halved until they fit. Rows that do not fit into a chunk at one position are read in several, and
    the references once more.
    """
    n_rows, n_pos, _ = vectors.shape
    d_vocab = W_U.shape[1]
    if not references:
        raise ValueError("a readout needs at least one reference row")
    if not 1 <= top_k <= d_vocab:
        raise ValueError(f"top_k must lie between 1 and the vocabulary of {d_vocab}, but is {top_k}")
    chunk_bytes = CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, but is {chunk_bytes}")
    W_U, b_U = _wide(W_U), _wide(b_U)

    def logits_of(rows: Sequence[int], where: slice) -> Float[Tensor, "some here d_vocab"]:
        some = [vectors[row : row + 1, where] for row in rows]
        if decode is not None:
            some = [decode(row, each) for row, each in zip(rows, some, strict=True)]
        decoded = torch.cat(some).flatten(0, 1)
        return project(decoded, W_U, b_U, soft_cap).view(len(rows), -1, d_vocab)

    parts: list[Readout] = []
    start, distributions = 0, max(1, chunk_bytes // (4 * d_vocab))
    while start < n_pos:
        # as many positions as go with all rows; where not even one does, some of the rows at one position
        width = max(1, distributions // n_rows)
        where = slice(start, start + width)
        try:
            if distributions >= n_rows:
                parts.append(_reduce(logits_of(range(n_rows), where), targets[where], references, top_k))
            else:
                parts.append(_by_rows(logits_of, n_rows, distributions, where, targets, references, top_k))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or distributions == 1:
                raise
            distributions //= 2
            continue
        start += width
    joined = {
        field.name: torch.cat(
            [getattr(part, field.name) for part in parts], dim=2 if field.name == "kl" else 1
        )
        for field in dataclasses.fields(Readout)
    }
    return Readout(**joined)


def _by_rows(
    logits_of: Callable[[Sequence[int], slice], Tensor],
    n_rows: int,
    at_once: int,
    where: slice,
    targets: Int[Tensor, "pos target"],
    references: Sequence[int],
    top_k: int,
) -> Readout:
    """Some rows at a time, each time behind the references, whose own statistics are then left out."""
    parts = []
    for first in range(0, n_rows, at_once):
        rows = [*references, *range(first, min(first + at_once, n_rows))]
        found = _reduce(logits_of(rows, where), targets[where], range(len(references)), top_k)
        parts.append(found.without_first(len(references)))
    return Readout(
        **{
            field.name: torch.cat(
                [getattr(part, field.name) for part in parts], dim=1 if field.name == "kl" else 0
            )
            for field in dataclasses.fields(Readout)
        }
    )


def _reduce(
    logits: Float[Tensor, "row pos d_vocab"],
    targets: Int[Tensor, "pos target"],
    references: Sequence[int],
    top_k: int,
) -> Readout:
    """All statistics of one chunk, whose logits are overwritten."""
    # relative to the largest, so that nothing overflows; finite, because 0 * -inf is no number
    logits -= logits.amax(-1, keepdim=True)
    lowest = torch.finfo(logits.dtype).min / 2
    logits.clamp_(min=lowest)
    scratch = logits.exp()
    total = scratch.sum(-1)
    log_total = total.log()
    entropy = log_total - torch.linalg.vecdot(scratch, logits) / total
    kl = []
    for reference in references:
        weights = scratch[reference] / total[reference, :, None]
        # sum of p_ref (log p_ref - log p_row)
        cross = torch.linalg.vecdot(weights[None], logits) - log_total
        kl.append(-entropy[reference] - cross)
    top = logits.topk(top_k, dim=-1)
    first = top.indices[references[0], :, :1]
    wanted = torch.cat([first, targets], dim=1).expand(len(logits), -1, -1)
    own = logits.gather(2, wanted)
    rank = torch.empty_like(wanted)
    for index in range(wanted.shape[2]):
        # counted in floats, which is faster than summing booleans, and exact below 2 ** 24
        torch.gt(logits, own[:, :, index, None], out=scratch)
        rank[:, :, index] = 1 + scratch.sum(-1).long()
    return Readout(
        top_ids=top.indices,
        top_probabilities=(top.values - log_total[..., None]).exp().float(),
        entropy=entropy.float(),
        # rounding alone makes a distribution's distance to itself negative
        kl=torch.stack(kl).clamp(min=0).float(),
        log_prob=(own - log_total[..., None]).masked_fill(own == lowest, -torch.inf).float(),
        rank=rank,
    )
