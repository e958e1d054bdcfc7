"""What patched runs are judged by: vectors after the last norm through the unembedding, a chunk at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.measures.vocabulary import CHUNK_BYTES, capped, project, target_log_prob


@dataclasses.dataclass(frozen=True, eq=False)
class Unembedding:
    """From vectors after the last norm to logits, in float32."""

    W_U: Float[Tensor, "d_model d_vocab"]
    b_U: Float[Tensor, " d_vocab"]
    soft_cap: float | None = None

    def logits(self, vectors: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_vocab"]:
        return project(vectors, self.W_U, self.b_U, self.soft_cap)

    def of(self, vectors: Float[Tensor, "row d_model"], tokens: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """The logit of one token per vector; no others are made."""
        columns = self.W_U[:, tokens].T
        logits = torch.linalg.vecdot(vectors.to(columns.dtype), columns) + self.b_U[tokens]
        return capped(logits, self.soft_cap)

    def log_prob(
        self, vectors: Float[Tensor, "row d_model"], tokens: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """The log-probability of one token per vector, nats."""
        return target_log_prob(vectors, self.W_U, self.b_U, tokens, soft_cap=self.soft_cap)[0]

    def kl(
        self, reference: Float[Tensor, "row d_model"], vectors: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, " row"]:
        """KL(reference || vector) of each pair, nats."""
        found = [
            _kl(self.logits(one), self.logits(other))
            for one, other in zip(self._split(reference), self._split(vectors), strict=True)
        ]
        return torch.cat(found)

    def judged(
        self, vectors: Float[Tensor, "row read d_model"], metric: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, " row"]:
        """A metric of whole logits `[read, d_vocab]`, a row at a time."""
        return torch.stack([metric(self.logits(row)).reshape(()).float() for row in vectors])

    def _split(self, vectors: Float[Tensor, "row d_model"]) -> Iterator[Tensor]:
        return iter(vectors.split(max(1, CHUNK_BYTES // (4 * self.W_U.shape[1]))))


def _kl(
    reference: Float[Tensor, "row d_vocab"], logits: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, " row"]:
    own, other = reference.log_softmax(-1), logits.log_softmax(-1)
    # a token that the reference excludes adds nothing, however likely the other finds it
    terms = torch.where(own.isneginf(), 0.0, own.exp() * (own - other))
    # rounding alone makes a distribution's distance to itself negative
    return terms.sum(-1).clamp(min=0)
