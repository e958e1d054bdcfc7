"""Embeddings on their way down an objective, and the tokens that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.features.objectives import Judge
from mechlens.measures.memory import is_out_of_memory

PRIORS = ("none", "softmax", "norm", "nearest")


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """Where real embeddings lie."""

    E: Float[Tensor, "d_vocab d_model"]
    unit: Float[Tensor, "d_vocab d_model"]
    inverse: Float[Tensor, "d_model d_model"]
    """Of `E.T @ E`: with it `E.T` is the pseudo-inverse."""
    norm: float

    @classmethod
    def of(cls, E: Float[Tensor, "d_vocab d_model"]) -> Space:
        # float64, since the Gram matrix has the square of the embedding's condition
        wide = E.double()
        inverse = torch.linalg.pinv(wide.T @ wide, hermitian=True).float()
        return cls(E, torch.nn.functional.normalize(E, dim=-1), inverse, float(E.norm(dim=-1).mean()))

    def coefficients(self, embedded: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """The smallest weights of tokens that sum to each embedding: its product with the pseudo-inverse."""
        return embedded @ self.inverse @ self.E.T

    def cosines(self, embedded: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        return torch.nn.functional.normalize(embedded, dim=-1) @ self.unit.T

    def between_tokens(self) -> float:
        """Mean cosine of a real embedding to the nearest other one, over at most 1000 of them."""
        some = torch.linspace(0, len(self.E) - 1, min(1000, len(self.E)), device=self.E.device).long()
        cosines = self.unit[some] @ self.unit.T
        cosines[torch.arange(len(some)), some] = -1
        return float(cosines.amax(-1).mean())


@dataclasses.dataclass(eq=False)
class Decoded:
    """The best tokens that each restart has passed, by the objective of running them."""

    ids: Int[Tensor, "restart pos"]
    objective: Float[Tensor, " restart"]
    activation: Float[Tensor, " restart"]


class Walk:
    """All restarts on their way."""

    def __init__(self, judge: Judge, space: Space, prior: str, weight: float, restarts: int) -> None:
        self.judge, self.space, self.prior, self.weight = judge, space, prior, weight
        self.rows = restarts
        self.objectives: list[Float[Tensor, " restart"]] = []
        self.activations: list[Float[Tensor, " restart"]] = []
        self.lowest = torch.full((restarts,), torch.inf)
        self.best: Tensor | None = None
        self.stalled = 0
        self.decoded: dict[str, Decoded] = {}

    def embedded(self, free: Tensor) -> Float[Tensor, "restart pos d_model"]:
        return free @ self.space.E if self.prior == "softmax" else free

    def gradient(self, free: Tensor) -> Tensor:
        """The gradient of objective and penalty, and a note of where the restarts are."""
        parts = self._in_parts(self._one_gradient, free.detach())
        gradient, total, objective, activation = (torch.cat(each) for each in zip(*parts, strict=True))
        self.objectives.append(objective.cpu())
        self.activations.append(activation.cpu())
        total = total.cpu()
        better = total < self.lowest
        if self.best is None:
            self.best = free.detach().clone()
        self.best = torch.where(better.to(free.device)[:, None, None], free.detach(), self.best)
        self.lowest = torch.minimum(self.lowest, total)
        self.stalled = 0 if bool(better.any()) else self.stalled + 1
        return gradient

    def _one_gradient(self, free: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        free = free.clone().requires_grad_()
        embedded = self.embedded(free)
        objective, activation = self.judge(embedded)
        total = objective
        if self.prior == "norm":
            total = total + self.weight * (embedded.norm(dim=-1) / self.space.norm - 1).square().sum(-1)
        elif self.prior == "nearest":
            total = total + self.weight * (1 - self.space.cosines(embedded).amax(-1)).sum(-1)
        (gradient,) = torch.autograd.grad(total.sum(), [free])
        return gradient, total.detach(), objective.detach(), activation.detach()

    def decode(self, free: Tensor) -> dict[str, Int[Tensor, "restart pos"]]:
        """Read the embeddings as tokens, run these, and keep what is better than before.

        Returns:
            The tokens, by decoding.
        """
        embedded = self.embedded(free)
        ways = {
            # a distribution over tokens tells by itself
            "pinv": free if self.prior == "softmax" else self.space.coefficients(embedded),
            "nearest": self.space.cosines(embedded),
        }
        read = {way: likeness.argmax(-1) for way, likeness in ways.items()}
        for way, ids in read.items():
            parts = self._in_parts(self._run, ids)
            objective, activation = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
            read[way], old = ids.cpu(), self.decoded.get(way)
            if old is None:
                self.decoded[way] = Decoded(read[way].clone(), objective, activation)
                continue
            better = objective < old.objective
            old.ids[better], old.objective[better] = read[way][better], objective[better]
            old.activation[better] = activation[better]
        return read

    def _run(self, ids: Int[Tensor, "row pos"]) -> tuple[Tensor, Tensor]:
        objective, activation = self.judge(self.judge.embeddings[ids])
        return objective.detach(), activation.detach()

    def _in_parts(
        self, make: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """All restarts together, or in halves of halves when memory runs out."""
        while True:
            try:
                return [make(part) for part in rows.split(self.rows)]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.rows == 1:
                    raise
                self.rows = (self.rows + 1) // 2
