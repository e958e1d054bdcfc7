"""Scores of attention patterns: how much of a head's attention goes where a mechanism would put it.

A mask is a list of (dest, src) entries. A score is the mean attention on a mask, in [0, 1], or for sinks the
largest of such means.
"""

from __future__ import annotations

import dataclasses

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """The entries of an attention pattern that a score averages, for each row of a batch."""

    dest: Int[Tensor, "batch entry"]
    """Query position of each entry; a batch of 1 applies to all rows."""
    src: Int[Tensor, "batch entry"]
    """Key position of each entry, at most its `dest`."""
    real: Bool[Tensor, "batch entry"] | None = None
    """Which entries count, if rows have different numbers of them; None if all do."""

    @staticmethod
    def of(where: Bool[Tensor, "*batch dest src"]) -> Mask:
        """The mask of the true entries, the same for all rows or one per row.

        Raises:
            ValueError: an entry above the diagonal, where a causal model cannot attend.
        """
        rows = where if where.ndim == 3 else where[None]
        if rows.triu(1).any():
            raise ValueError("a mask must be on or below the diagonal: src must not come after dest")
        counts = rows.sum((1, 2))
        width = int(counts.max()) if len(counts) else 0
        row, dest, src = rows.nonzero(as_tuple=True)
        place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        entries = torch.zeros(2, len(rows), width, dtype=torch.long)
        entries[:, row, place] = torch.stack([dest, src])
        real = torch.arange(width) < counts[:, None]
        return Mask(entries[0], entries[1], None if bool(real.all()) else real)

    def to(self, device: torch.device | str) -> Mask:
        real = None if self.real is None else self.real.to(device)
        return Mask(self.dest.to(device), self.src.to(device), real)

    def of_rows(self, rows: slice) -> Mask:
        """The mask of some rows of the batch."""
        if len(self.dest) == 1:
            return self
        return Mask(self.dest[rows], self.src[rows], None if self.real is None else self.real[rows])


def mask_score(pattern: Float[Tensor, "batch head dest src"], mask: Mask) -> Float[Tensor, "batch head"]:
    """Mean attention on a mask, for each row and head.

    Args:
        pattern: attention after softmax; each row sums to 1.

    Returns:
        Probability in [0, 1]; nan for a row whose mask is empty.

    Raises:
        ValueError: the mask has entries outside the pattern, or a different number of rows.

    Example:
        >>> from mechlens.measures.attention import mask_score, previous_token_mask
        >>> pattern = torch.eye(4).roll(-1, 1)  # each position attends to the one before it
        >>> mask_score(pattern[None, None], previous_token_mask(4))
        tensor([[1.]])

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", for the
    previous-token and induction masks.
    """
    batch, _, n_dest, n_src = pattern.shape
    if mask.dest.shape[0] not in (1, batch):
        raise ValueError(f"the mask has {mask.dest.shape[0]} rows, but the pattern has {batch}")
    if mask.dest.numel() and (mask.dest.max() >= n_dest or mask.src.max() >= n_src):
        raise ValueError(
            f"the mask reaches ({int(mask.dest.max())}, {int(mask.src.max())}), but the pattern has "
            f"{n_dest} x {n_src} positions"
        )
    rows = torch.arange(batch, device=pattern.device)[:, None]
    entries = pattern[rows, :, mask.dest, mask.src].float()  # [batch, entry, head]
    if mask.real is None:
        return entries.mean(1)
    real = mask.real[..., None]
    return entries.where(real, 0).sum(1) / real.sum(1)


@dataclasses.dataclass(frozen=True)
class Sinks:
    """In place of a mask: the score is `sink_score`."""

    n_pos: int
    """Length of the sequences."""

    def __post_init__(self) -> None:
        if self.n_pos < 2:
            raise ValueError(f"an attention-sink score needs at least 2 positions, but there is {self.n_pos}")


def sink_score(pattern: Float[Tensor, "batch head dest src"]) -> Float[Tensor, "batch head"]:
    """The largest mean attention that one position receives from all later ones, for each row and head.

    A position competes only if at least half as many positions follow it as follow the first. Otherwise a
    previous-token head would have its sink at the last position but one, to which one position attends.

    Args:
        pattern: attention after softmax; each row sums to 1.

    Returns:
        Probability in [0, 1]: the first-token score or more.

    Example:
        >>> from mechlens.measures.attention import sink_score
        >>> pattern = torch.eye(5)
        >>> pattern[2:] = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])  # all later positions attend to the second
        >>> sink_score(pattern[None, None])
        tensor([[1.]])

    References: Gu et al. 2024, "When Attention Sink Emerges in Language Models", arXiv:2410.10781, the
    importance score of a token. They include the token's attention to itself, which is 1 at the first.
    """
    n = pattern.shape[-1]
    following = torch.arange(n - 1, n - 1 - (n + 1) // 2, -1, device=pattern.device)
    some = pattern[..., : len(following)]
    received = some.sum(-2, dtype=torch.float32) - some.diagonal(dim1=-2, dim2=-1).float()
    return (received / following).amax(-1)


def uniform_attention(where: Mask | Sinks) -> float:
    """The score of a head that attends equally to every position it can see.

    For a mask, this is also the expected score of any head after its attention at each destination is
    shuffled over the positions it can see. So it is the null baseline for scores that depend on positions
    alone. For sinks, it is the mean attention to the first position, where uniform attention is largest.
    """
    mask = first_token_mask(where.n_pos) if isinstance(where, Sinks) else where
    chance = 1 / (mask.dest + 1).double()
    return float(chance.mean() if mask.real is None else chance[mask.real].mean())


# -- the masks of the standard scores --------------------------------------------------------------


def previous_token_mask(n_pos: int) -> Mask:
    """From every position but the first to the one before it.

    A perfect previous-token head scores 1.
    """
    if n_pos < 2:
        raise ValueError(f"a previous-token score needs at least 2 positions, but there is {n_pos}")
    dest = torch.arange(1, n_pos)[None]
    return Mask(dest, dest - 1)


def first_token_mask(n_pos: int) -> Mask:
    """From every position but the first, which can attend nowhere else, to the first.

    Inactive heads attend there.
    """
    if n_pos < 2:
        raise ValueError(f"a first-token score needs at least 2 positions, but there is {n_pos}")
    dest = torch.arange(1, n_pos)[None]
    return Mask(dest, torch.zeros_like(dest))


def copies_mask(starts: Int[Tensor, "batch copy"], seq_len: int, shift: int) -> Mask:
    """From each position of a later copy to the same position of every earlier copy, plus `shift`.

    Args:
        starts: where each copy of the tokens begins.
        seq_len: tokens in one copy.
        shift: 0 for the duplicate token; 1 for the token after it, which an induction head attends to.

    Copy c (from 0) has c earlier copies, each with its own entry. So a head that puts all its attention on
    the entries scores 1 with two copies, and 1 / (mean number of earlier copies) with more: 0.5 with four.

    References: Olsson et al. 2022, arXiv:2209.11895.
    """
    if starts.shape[1] < 2:
        raise ValueError(f"tokens must come at least twice, but there is {starts.shape[1]} copy of them")
    within = torch.arange(seq_len)
    later, earlier = torch.tril_indices(starts.shape[1], starts.shape[1], offset=-1)
    dest, src = (
        rearrange(starts[:, copy, None] + within, "batch pair pos -> batch (pair pos)")
        for copy in (later, earlier)
    )
    return Mask(dest, src + shift)


def diagonal_mask(n_pos: int, offset: int) -> Mask:
    """The whole diagonal src = dest + offset of a pattern, with offset <= 0.

    With offset 1 - S on `[BOS, S tokens, the same S]` it is the mask of the induction score in "How one can
    Interpret GPT2-Small". The first two of its S + 2 entries are not induction, so a perfect induction head
    scores S / (S + 2) plus its attention on those two / (S + 2).
    """
    if not -n_pos < offset <= 0:
        raise ValueError(f"a pattern of {n_pos} positions has diagonals {1 - n_pos} to 0, not {offset}")
    dest = torch.arange(-offset, n_pos)[None]
    return Mask(dest, dest + offset)


def duplicate_token_mask(tokens: Int[Tensor, "batch pos"]) -> Mask:
    """From each position to every earlier occurrence of the same token."""
    return Mask.of(_duplicates(tokens))


def induction_mask(tokens: Int[Tensor, "batch pos"]) -> Mask:
    """From each position to the token after every earlier occurrence of its token, but never to itself."""
    where = _duplicates(tokens).roll(1, dims=2)
    where[:, :, 0] = False
    return Mask.of(where.tril(-1))


def _duplicates(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch dest src"]:
    return (tokens[:, :, None] == tokens[:, None, :]).tril(-1)


# -- copying ---------------------------------------------------------------------------------------


def copying_score(
    contribution: Float[Tensor, "*batch src token"],
    mean_contribution: Float[Tensor, "*batch src"],
    attention: Float[Tensor, "*batch src"],
    own: Int[Tensor, " src"],
) -> Float[Tensor, "*batch"]:
    """How much of the logit increase from a head goes to the token that it attends to.

    For each source, the head's direct contribution to the logits of the sample's tokens is centered
    by its mean over the vocabulary and passed through ReLU. The source token's share of the sum over
    the sample's tokens is that source's r. The shares are averaged, weighted by the attention that each
    source receives. Scaling a source's contribution (by attention, or by a final norm) does not change
    its share.

    Args:
        contribution: each source's contribution to the logits of the sample's tokens, `v @ W_O @ W_U`.
        mean_contribution: the mean of that contribution over the whole vocabulary.
        attention: total attention that each source receives.
        own: for each source, the index of its own token along `token`.

    Returns:
        2 r - 1, in [-1, 1]: at 1 the head raises only the attended token, at -1 never. nan where the head
        raises no token of the sample from any source that it attends to.

    References: Olsson et al. 2022, arXiv:2209.11895. They give no formula for attention to several sources;
    the attention-weighted average is our interpretation.
    """
    raised = (contribution - mean_contribution[..., None]).relu()
    total = raised.sum(-1)
    index = own.expand(*raised.shape[:-2], -1)[..., None]
    share = raised.gather(-1, index)[..., 0] / total
    weight = attention.where(total > 0, 0)
    return 2 * (weight * share.nan_to_num(0)).sum(-1) / weight.sum(-1) - 1
