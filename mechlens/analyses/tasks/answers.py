"""The metric of a task, read from the last position's residual stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.errors import ArgumentError
from mechlens.measures.unembedding import Unembedding
from mechlens.models.protocol import LensModel
from mechlens.models.run.unembedding import final_norm, unembedding
from mechlens.text.task_prompts import EncodedPrompt

METRICS = ("logit_diff", "probability_diff")
TOGETHER = 32
"""Prompts whose logits are in memory at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """The right and the wrong answers of some prompts, and the metric that compares them."""

    model: LensModel
    metric: str
    right: tuple[Int[Tensor, "prompt right"], Bool[Tensor, "prompt right"]]
    """Ids, padded to the largest number that a prompt has, and which of them are answers."""
    wrong: tuple[Int[Tensor, "prompt wrong"], Bool[Tensor, "prompt wrong"]]

    @classmethod
    def of(cls, model: LensModel, prompts: Sequence[EncodedPrompt], metric: str) -> Answers:
        """Raises ArgumentError: another metric."""
        if metric not in METRICS:
            raise ArgumentError("metric", f"one of {', '.join(METRICS)}", metric)
        device = model.W_U.device
        right, wrong = (
            _padded([getattr(each, name) for each in prompts], device) for name in ("answers", "wrong")
        )
        return cls(model, metric, right, wrong)

    def __call__(
        self, final: Float[Tensor, "row d_model"], prompts: slice | Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """The metric of some rows; a gradient may be taken by their streams.

        Args:
            final: the stream that the logits of each row's last position are made from.
            prompts: which prompt each row is.
        """
        found = []
        for rows in torch.arange(len(final)).split(TOGETHER):
            vectors = final_norm(self.model, final[rows].to(self.model.W_U.dtype))
            read = unembedding(self.model)
            if self.metric == "logit_diff":
                # what makes logits log-probabilities is the same for both, and cancels
                logs = [
                    _answer_logits(read, vectors, ids[prompts][rows]) for ids, _ in (self.right, self.wrong)
                ]
            else:
                log_probs = read.logits(vectors).log_softmax(-1)
                logs = [log_probs.gather(1, ids[prompts][rows]) for ids, _ in (self.right, self.wrong)]
            high, low = (
                each.masked_fill(~there[prompts][rows], -torch.inf).logsumexp(1)
                for each, (_, there) in zip(logs, (self.right, self.wrong), strict=True)
            )
            found.append(high - low if self.metric == "logit_diff" else high.exp() - low.exp())
        return torch.cat(found).float()


def _answer_logits(
    read: Unembedding, vectors: Float[Tensor, "row d_model"], ids: Int[Tensor, "row most"]
) -> Float[Tensor, "row most"]:
    every = vectors[:, None].expand(-1, ids.shape[1], -1).flatten(0, 1)
    return read.of(every, ids.flatten()).view(ids.shape)


def _padded(
    some: Sequence[tuple[int, ...]], device: torch.device
) -> tuple[Int[Tensor, "prompt most"], Bool[Tensor, "prompt most"]]:
    most = max(map(len, some))
    ids = torch.tensor([[*each, *[0] * (most - len(each))] for each in some], device=device)
    there = torch.tensor([[at < len(each) for at in range(most)] for each in some], device=device)
    return ids, there
