"""How widely attention is spread: its entropy, its distance, and the share on the first token."""

from __future__ import annotations

import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor


def attention_spread(pattern: Float[Tensor, "*batch dest src"]) -> Float[Tensor, "*batch measure"]:
    """Entropy, distance and first-token share of attention, averaged over all positions but the first.

    The first position can attend only to itself, so it tells nothing about a head.

    Args:
        pattern: attention after softmax; each row sums to 1.

    Returns:
        Entropy in nats, from 0 to log(src); mean distance from query to key, in tokens; attention to the
        first token, in [0, 1].

    Raises:
        ValueError: fewer than two positions.

    Example:
        >>> attention_spread(torch.eye(4).roll(-1, 1))  # attends one token back: no spread, distance 1
        tensor([0.0000, 1.0000, 0.3333])
    """
    n = pattern.shape[-1]
    if n < 2:
        raise ValueError(f"attention_spread needs at least 2 positions, got {n}")
    later = pattern[..., 1:, :].float()
    distance = torch.arange(1, n, device=pattern.device)[:, None] - torch.arange(n, device=pattern.device)
    measures = (
        reduce(torch.special.entr(later), "... dest src -> ... dest", "sum"),
        einsum(later, distance.float(), "... dest src, dest src -> ... dest"),
        later[..., 0],
    )
    return torch.stack([reduce(each, "... dest -> ...", "mean") for each in measures], -1)
