"""How logits vary over layers, for tokens binned by their final rank; computed some positions at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.measures.unembedding import Unembedding

CHUNK_BYTES = 16 * 2**20
"""Memory for the logits of all rows at the positions that are processed together."""


@dataclasses.dataclass(frozen=True, eq=False)
class VocabularyVariance:
    """Means over the tokens of each bin. Logits are centered over the vocabulary."""

    variance: Float[Tensor, "bin pos"]
    """Variance over rows of a token's logit."""
    null_variance: Float[Tensor, "null bin pos"]
    """The same with tokens assigned to bins at random."""
    elsewhere_variance: Float[Tensor, "bin pos"]
    """The same with tokens binned by their rank at another position; nan without `elsewhere`."""
    mean: Float[Tensor, "row bin pos"]
    """Mean of the logits."""
    spread: Float[Tensor, "row bin pos"]
    """Standard deviation of the logits over the bin's tokens."""
    excess: Float[Tensor, "row bin pos"]
    """Mean distance |logit - logit in the last row|."""
    probability: Float[Tensor, "bin pos"]
    """Total probability of a bin's tokens in the last row, including any soft-cap."""


def vocabulary_variance(
    vectors: Float[Tensor, "row pos d_model"],
    unembedding: Unembedding,
    *,
    bins: Sequence[tuple[int, int]],
    over: slice = slice(None),
    elsewhere: Int[Tensor, " pos"] | None = None,
    nulls: int = 0,
    generator: torch.Generator | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> VocabularyVariance:
    """Measure how logits vary over rows, for tokens binned by their rank in the last row.

    Logits are taken before the soft-cap, minus their mean over the vocabulary at the same row and position.
    The variance is the population variance (divided by the number of rows).

    Args:
        vectors: one row per layer, with the same positions in each; the last row is the model's final one.
        bins: first and last rank of each bin, in order and without gaps, from 1 to `d_vocab`. Tokens with
            equal logits are ranked in the order of their ids.
        over: the rows over which the variance is taken.
        elsewhere: for each position, another position whose ranks define a second binning.
        nulls: number of random assignments to bins. Each assigns different tokens at every position.
        generator: draws the nulls, on the CPU.
        decode: applied to vectors `[..., d_model]` before the unembedding, such as a norm.

    Raises:
        ValueError: bins that are not in order or have gaps.

    Cost: one product with `W_U` per row (one more with `elsewhere`), and a sort of the last row. Memory for
    about three chunks of logits; a chunk contains all rows at some positions.
    """
    n_rows, n_pos, _ = vectors.shape
    d_vocab, device = unembedding.d_vocab, vectors.device
    ends = [0, *(last for _, last in bins)]
    if [first for first, _ in bins] != [end + 1 for end in ends[:-1]] or ends[-1] != d_vocab:
        raise ValueError(f"bins must go from rank 1 to {d_vocab} without a gap, got {tuple(bins)}")
    slices = [slice(first - 1, last) for first, last in bins]
    uncapped = dataclasses.replace(unembedding, soft_cap=None)

    def logits_of(some: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        decoded = some if decode is None else decode(some)
        return uncapped.logits(decoded.flatten(0, -2)).view(*some.shape[:-1], d_vocab)

    def by_bin(values: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch bin"]:
        return torch.stack([values[..., part].mean(-1) for part in slices], dim=-1)

    draws = [torch.randperm(d_vocab, generator=generator).to(device) for _ in range(nulls)]
    offsets = torch.randint(d_vocab, (nulls, n_pos), generator=generator).to(device)
    width = max(1, CHUNK_BYTES // (4 * d_vocab * n_rows))
    found: dict[str, list[Tensor]] = {field.name: [] for field in dataclasses.fields(VocabularyVariance)}
    for start in range(0, n_pos, width):
        here = slice(start, start + width)
        logits = logits_of(vectors[:, here])
        probabilities = unembedding.capped(logits[-1]).softmax(-1)
        order = _order(logits[-1])
        logits -= logits.mean(-1, keepdim=True)
        variance = logits[over].var(0, correction=0)
        found["variance"].append(by_bin(variance.gather(-1, order)))
        columns = torch.arange(d_vocab, device=device)
        nulls_here = [
            # the same draw, shifted differently at each position
            by_bin(variance.gather(-1, draw[(columns + offset[here, None]) % d_vocab]))
            for draw, offset in zip(draws, offsets, strict=True)
        ]
        empty = variance.new_empty(0, len(variance), len(bins))
        found["null_variance"].append(torch.stack(nulls_here) if nulls_here else empty)
        if elsewhere is None:
            found["elsewhere_variance"].append(torch.full_like(found["variance"][-1], torch.nan))
        else:
            other = _order(logits_of(vectors[-1, elsewhere[here]]))
            found["elsewhere_variance"].append(by_bin(variance.gather(-1, other)))
        found["probability"].append(by_bin(probabilities.gather(-1, order)))
        ranked = logits.gather(-1, order.expand(n_rows, -1, -1))
        found["mean"].append(by_bin(ranked))
        found["spread"].append(
            torch.stack([ranked[..., part].std(-1, correction=0) for part in slices], dim=-1)
        )
        ranked -= ranked[-1:].clone()
        found["excess"].append(by_bin(ranked.abs_()))
    joined = {name: torch.cat(parts, dim=-2).transpose(-1, -2) for name, parts in found.items()}
    sizes = torch.tensor([last - first + 1 for first, last in bins], device=device)
    joined["probability"] = joined["probability"] * sizes[:, None]
    return VocabularyVariance(**joined)


def _order(logits: Float[Tensor, "pos d_vocab"]) -> Int[Tensor, "pos d_vocab"]:
    """Tokens by descending logit."""
    return torch.sort(logits, dim=-1, descending=True, stable=True).indices
