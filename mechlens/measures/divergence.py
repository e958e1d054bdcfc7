"""KL divergence to reference distributions, and its gradient."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.measures.unembedding import Unembedding


def kl(
    log_p: Float[Tensor, "*batch d_vocab"], log_q: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p || q) in nats, from log probabilities; differentiable.

    A token with probability 0 under p adds nothing, whatever its probability under q. The result is clamped
    at 0, because rounding can make the divergence of a distribution from itself negative.
    """
    terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(-1).clamp(min=0)


def reference_of(unembedding: Unembedding, normed: Float[Tensor, "pos d_model"]) -> Reference:
    """The next-token distributions of vectors after the last norm, as references for KL divergences."""
    if unembedding.soft_cap is not None:
        return _Capped(unembedding, unembedding.logits(normed).log_softmax(-1))
    return _Linear(unembedding, normed, *unembedding.expected_column(normed))


@dataclasses.dataclass(frozen=True, eq=False)
class _Linear:
    """Reference distributions reduced to what KL and its gradient need; no logits are kept."""

    unembedding: Unembedding
    normed: Float[Tensor, "pos d_model"]
    column: Float[Tensor, "pos d_model"]
    """The mean column of `W_U` under each distribution."""
    log_total: Float[Tensor, " pos"]

    def kl_and_gradient(
        self, normed: Float[Tensor, "pos d_model"]
    ) -> tuple[Float[Tensor, " pos"], Float[Tensor, "pos d_model"]]:
        """KL(reference || normed) in nats, and its gradient with respect to `normed`.

        KL is the mean difference of the logits under the reference, where `b_U` cancels, minus the difference
        of their log-sum-exps. So its gradient is the difference of the two mean columns.
        """
        column, log_total = self.unembedding.expected_column(normed)
        linear = torch.linalg.vecdot(self.normed - normed, self.column)
        return linear + log_total - self.log_total, column - self.column


@dataclasses.dataclass(frozen=True, eq=False)
class _Capped:
    """The same with a soft-cap: all log probabilities are kept, and each logit has its own slope."""

    unembedding: Unembedding
    log_probs: Float[Tensor, "pos d_vocab"]

    def kl_and_gradient(
        self, normed: Float[Tensor, "pos d_model"]
    ) -> tuple[Float[Tensor, " pos"], Float[Tensor, "pos d_model"]]:
        logits = self.unembedding.logits(normed)
        own = logits.log_softmax(-1)
        slope = self.unembedding.cap_slope(logits)
        found = kl(self.log_probs, own)
        return found, own.exp_().sub_(self.log_probs.exp()).mul_(slope) @ self.unembedding.W_U.T


Reference = _Linear | _Capped
