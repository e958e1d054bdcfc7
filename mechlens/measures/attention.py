"""Scores of attention patterns: how much of a head's attention lies where a mechanism would put it.

A *stripe* is a list of (dest, src) pairs, and a score is the mean attention on a stripe. All scores
lie in [0, 1].
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Stripe:
    """Which entries of an attention pattern a score reads, for each row of a batch."""

    dest: Int[Tensor, "batch entry"]
    """Query position of each entry; a batch of 1 holds for all rows."""
    src: Int[Tensor, "batch entry"]
    """Key position of each entry, at most its `dest`."""
    real: Bool[Tensor, "batch entry"] | None = None
    """Which entries count, where rows have different numbers of them; None: all do."""

    @staticmethod
    def of_mask(mask: Bool[Tensor, "*batch dest src"]) -> Stripe:
        """The stripe of the true entries of a mask, one for all rows or one for each.

        Raises:
            ValueError: an entry above the diagonal, where a causal model cannot attend.
        """
        rows = mask if mask.ndim == 3 else mask[None]
        if rows.triu(1).any():
            raise ValueError("a stripe lies on or below the diagonal: src must not come after dest")
        counts = rows.sum((1, 2))
        width = int(counts.max()) if len(counts) else 0
        row, dest, src = rows.nonzero(as_tuple=True)
        place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        entries = torch.zeros(2, len(rows), width, dtype=torch.long)
        entries[:, row, place] = torch.stack([dest, src])
        real = torch.arange(width) < counts[:, None]
        return Stripe(entries[0], entries[1], None if bool(real.all()) else real)

    def to(self, device: torch.device | str) -> Stripe:
        real = None if self.real is None else self.real.to(device)
        return Stripe(self.dest.to(device), self.src.to(device), real)


def stripe_score(
    pattern: Float[Tensor, "batch head dest src"], stripe: Stripe
) -> Float[Tensor, "batch head"]:
    """Mean attention on a stripe, for each row and head.

    Args:
        pattern: attention after softmax; each row of it sums to 1.

    Returns:
        Probability in [0, 1]; nan for a row whose stripe is empty.

    Raises:
        ValueError: the stripe reaches beyond the pattern, or belongs to another number of rows.
    """
    batch, _, n_dest, n_src = pattern.shape
    if stripe.dest.shape[0] not in (1, batch):
        raise ValueError(f"the stripe belongs to {stripe.dest.shape[0]} rows, but the pattern has {batch}")
    if stripe.dest.numel() and (stripe.dest.max() >= n_dest or stripe.src.max() >= n_src):
        raise ValueError(
            f"the stripe reaches ({int(stripe.dest.max())}, {int(stripe.src.max())}), "
            f"but the pattern has {n_dest} x {n_src} positions"
        )
    rows = torch.arange(batch, device=pattern.device)[:, None]
    entries = pattern[rows, :, stripe.dest, stripe.src].float()  # [batch, entry, head]
    if stripe.real is None:
        return entries.mean(1)
    real = stripe.real[..., None]
    return entries.where(real, 0).sum(1) / real.sum(1)


# -- the stripes of the field's scores -------------------------------------------------------------


def previous_token_stripe(n_pos: int) -> Stripe:
    """From every position but the first to the one before it."""
    if n_pos < 2:
        raise ValueError(f"a previous-token score needs at least 2 positions, but there is {n_pos}")
    dest = torch.arange(1, n_pos)[None]
    return Stripe(dest, dest - 1)


def first_token_stripe(n_pos: int) -> Stripe:
    """From every position but the first to the first, which can attend nowhere else."""
    if n_pos < 2:
        raise ValueError(f"a first-token score needs at least 2 positions, but there is {n_pos}")
    dest = torch.arange(1, n_pos)[None]
    return Stripe(dest, torch.zeros_like(dest))


def copies_stripe(starts: Int[Tensor, "batch copy"], seq_len: int, shift: int) -> Stripe:
    """From each position of a later copy to the same place of every earlier copy, plus `shift`.

    `shift` 0 is the duplicate token, 1 the token after it. Copy c has c earlier copies, each an
    entry of its own.
    """
    if starts.shape[1] < 2:
        raise ValueError(f"tokens must come at least twice, but there is {starts.shape[1]} copy of them")
    within = torch.arange(seq_len)
    dest, src = [], []
    for later in range(1, starts.shape[1]):
        for earlier in range(later):
            dest.append(starts[:, later, None] + within)
            src.append(starts[:, earlier, None] + within + shift)
    return Stripe(torch.cat(dest, 1), torch.cat(src, 1))


def diagonal_stripe(n_pos: int, offset: int) -> Stripe:
    """The whole diagonal of a pattern: src = dest + offset, offset <= 0."""
    if not -n_pos < offset <= 0:
        raise ValueError(f"a pattern of {n_pos} positions has diagonals {1 - n_pos} to 0, not {offset}")
    dest = torch.arange(-offset, n_pos)[None]
    return Stripe(dest, dest + offset)


def duplicate_mask(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch dest src"]:
    """Where src is an earlier occurrence of the token at dest."""
    return (tokens[:, :, None] == tokens[:, None, :]).tril(-1)


def induction_mask(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch dest src"]:
    """Where src comes right after an earlier occurrence of the token at dest (dest itself excluded)."""
    mask = duplicate_mask(tokens).roll(1, dims=2)
    mask[:, :, 0] = False
    return mask.tril(-1)


# -- the field's scores, on patterns of the canonical layouts --------------------------------------


def _starts(n_pos: int, seq_len: int, copies: int) -> Int[Tensor, "1 copy"]:
    first = n_pos - copies * seq_len
    if seq_len < 1 or first not in (0, 1):
        raise ValueError(
            f"{copies} copies of {seq_len} tokens, with or without BOS, make {copies * seq_len + 1} or "
            f"{copies * seq_len} positions, but the pattern has {n_pos}"
        )
    return (first + seq_len * torch.arange(copies))[None]


def _score(pattern: Tensor, stripe: Stripe) -> Tensor:
    """`stripe_score` for patterns with any leading axes, or none."""
    flat = pattern.reshape(1, -1, *pattern.shape[-2:])
    return stripe_score(flat, stripe.to(pattern.device))[0].reshape(pattern.shape[:-2])


def previous_token_score(pattern: Float[Tensor, "*batch dest src"]) -> Float[Tensor, "*batch"]:
    """Mean attention that each position pays to the one before it.

    Args:
        pattern: attention after softmax; each row sums to 1.

    Returns:
        Probability in [0, 1]; 1 is a perfect previous-token head.

    Raises:
        ValueError: fewer than two positions, so no token has a predecessor.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    return _score(pattern, previous_token_stripe(pattern.shape[-1]))


def first_token_score(pattern: Float[Tensor, "*batch dest src"]) -> Float[Tensor, "*batch"]:
    """Mean attention that each position but the first pays to the first: a head at rest.

    Returns:
        Probability in [0, 1].

    Raises:
        ValueError: fewer than two positions.
    """
    return _score(pattern, first_token_stripe(pattern.shape[-1]))


def induction_score(pattern: Float[Tensor, "*batch dest src"], seq_len: int) -> Float[Tensor, "*batch"]:
    """Mean attention from the second copy to the token after the first copy of the same token.

    Args:
        pattern: attention after softmax on `[BOS, S tokens, the same S]` or the same without BOS.
        seq_len: S.

    Returns:
        Probability in [0, 1], the mean over the S positions of the second copy; 1 is a perfect
        induction head.

    Raises:
        ValueError: the pattern is not that of two copies of S tokens.

    Source: Olsson et al. 2022, arXiv:2209.11895. The article "How one can Interpret GPT2-Small"
    averages over the whole diagonal instead: `induction_diagonal_score`.
    """
    starts = _starts(pattern.shape[-1], seq_len, 2)
    return _score(pattern, copies_stripe(starts, seq_len, 1))


def induction_diagonal_score(
    pattern: Float[Tensor, "*batch dest src"], seq_len: int
) -> Float[Tensor, "*batch"]:
    """Mean over the whole diagonal at offset 1 - S, as "How one can Interpret GPT2-Small" has it.

    After BOS the diagonal has S + 2 entries, and its first two are no induction: a perfect induction
    head scores S / (S + 2) plus whatever lies on them. Kept for comparison with published figures.

    Raises:
        ValueError: the pattern is not that of two copies of S tokens.
    """
    _starts(pattern.shape[-1], seq_len, 2)
    return _score(pattern, diagonal_stripe(pattern.shape[-1], 1 - seq_len))


def duplicate_token_score(pattern: Float[Tensor, "*batch dest src"], seq_len: int) -> Float[Tensor, "*batch"]:
    """Mean attention from the second copy to the first occurrence of the same token.

    Returns:
        Probability in [0, 1], the mean over the S positions of the second copy.

    Raises:
        ValueError: the pattern is not that of two copies of S tokens.
    """
    starts = _starts(pattern.shape[-1], seq_len, 2)
    return _score(pattern, copies_stripe(starts, seq_len, 0))


def prefix_matching_score(
    pattern: Float[Tensor, "*batch dest src"], seq_len: int = 25, copies: int = 4
) -> Float[Tensor, "*batch"]:
    """Mean attention to the tokens after *every* earlier copy of the same token.

    Every (position, earlier copy) pair is an entry, so a head that spends all its attention on them
    scores 1 / mean(number of earlier copies): 0.5 with four copies.

    Raises:
        ValueError: the pattern is not that of `copies` copies of `seq_len` tokens.

    Source: Olsson et al. 2022, arXiv:2209.11895.
    """
    starts = _starts(pattern.shape[-1], seq_len, copies)
    return _score(pattern, copies_stripe(starts, seq_len, 1))


def uniform_attention(stripe: Stripe) -> float:
    """What a head that attends equally to all it can see scores on a stripe.

    It is also the expected score of any head whose attention, at each destination, is shuffled over
    the positions it can see, which makes it the null of scores that depend on positions alone.
    """
    chance = 1 / (stripe.dest + 1).double()
    return float(chance.mean() if stripe.real is None else chance[stripe.real].mean())


def copying_score(
    contribution: Float[Tensor, "*batch src token"],
    mean_contribution: Float[Tensor, "*batch src"],
    attention: Float[Tensor, "*batch src"],
    own: Int[Tensor, " src"],
) -> Float[Tensor, "*batch"]:
    """How much of what a head raises in the logits is the very token it attends to.

    For each source, the head's direct contribution to the logits of the sample's tokens is centred
    by its mean over the vocabulary and passed through ReLU; the source token's share of the sum over
    the sample's tokens is that source's r. The shares are averaged with the attention that each
    source receives. Scaling a source's contribution (by attention, or by a final norm) changes none
    of them.

    Args:
        contribution: of each source to the logits of the sample's tokens, `v @ W_O @ W_U`.
        mean_contribution: its mean over the whole vocabulary.
        attention: total attention that each source receives.
        own: for each source, the index of its own token along `token`.

    Returns:
        2 r - 1, in [-1, 1]: 1 raises only the attended token, -1 never raises it. nan where the head
        raises no token of the sample from any source that it attends to.

    Source: Olsson et al. 2022, arXiv:2209.11895. They publish no formula for sources that share the
    attention: the average by attention is our reading.
    """
    raised = (contribution - mean_contribution[..., None]).relu()
    total = raised.sum(-1)
    index = own.expand(*raised.shape[:-2], -1)[..., None]
    share = raised.gather(-1, index)[..., 0] / total
    weight = attention.where(total > 0, 0)
    return 2 * (weight * share.nan_to_num(0)).sum(-1) / weight.sum(-1) - 1
