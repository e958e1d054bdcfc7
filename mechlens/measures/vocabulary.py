"""The streaming readout: residual vectors against the whole vocabulary, a chunk at a time."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK_BYTES = 64 * 2**20
"""Memory for one chunk of float32 logits."""


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
    # in float32 from the product on: rounded logits tie, and a tie counts as the most likely token
    wide = torch.promote_types(W_U.dtype, torch.float32)
    vectors, W_U, b_U = vectors.to(wide), W_U.to(wide), b_U.to(wide)
    rows = max(1, CHUNK_BYTES // (4 * W_U.shape[1]))
    log_probs, firsts = [], []
    for some, wanted in zip(vectors.split(rows), targets.split(rows), strict=True):
        logits = torch.addmm(b_U, some, W_U)
        if soft_cap is not None:
            logits = soft_cap * (logits / soft_cap).tanh()
        own = logits.gather(1, wanted[:, None])[:, 0]
        log_probs.append(own - logits.logsumexp(1))
        firsts.append(own == logits.amax(1))
    if not log_probs:
        return vectors.new_empty(0, dtype=torch.float32), targets.new_empty(0, dtype=torch.bool)
    return torch.cat(log_probs).float(), torch.cat(firsts)
