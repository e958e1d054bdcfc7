"""Embeddings on their way down an objective, and the tokens that they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.features.objectives import Judge
from mechlens.measures.memory import in_parts

PENALTIES = ("norm", "nearest")
PRIORS = ("none", "softmax", *PENALTIES)
DECODE_EVERY = 5
"""Steps between two looks at the tokens that the embeddings stand for."""


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
        some = (
            torch.linspace(0, len(self.E) - 1, min(1000, len(self.E)), dtype=torch.double)
            .long()
            .to(self.E.device)
        )
        cosines = self.unit[some] @ self.unit.T
        cosines[torch.arange(len(some)), some] = -1
        return float(cosines.amax(-1).mean())


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """The best tokens that each restart has passed, by the objective of running them."""

    ids: Int[Tensor, "restart pos"]
    objective: Float[Tensor, " restart"]
    activation: Float[Tensor, " restart"]


WAYS = ("pinv", "nearest")
_DECODED = dataclasses.fields(Decoded)
TENSORS = (
    *("free", "optimiser", "objectives", "activations", "lowest", "best", "stalled"),
    *(f"{way}_{field.name}" for way in WAYS for field in _DECODED),
)
"""What a checkpoint holds."""


class Walk:
    """All restarts on their way."""

    def __init__(
        self,
        judge: Judge,
        space: Space,
        prior: str,
        weight: float,
        free: Float[Tensor, "restart pos width"],
        optimiser: torch.optim.Optimizer,
    ) -> None:
        """`free` is what the optimiser changes: embeddings, or distributions over tokens."""
        self.judge, self.space, self.prior, self.weight = judge, space, prior, weight
        self.free, self.optimiser = free, optimiser
        self.rows = len(free)
        self.objectives: list[Float[Tensor, " restart"]] = []
        self.activations: list[Float[Tensor, " restart"]] = []
        self.lowest = torch.full((len(free),), torch.inf, dtype=torch.float32)
        self.best = free.detach().clone()
        self.stalled = 0
        self.decoded: dict[str, Decoded] = {}

    @property
    def steps(self) -> int:
        return len(self.objectives)

    def begin(self) -> None:
        """Look at the starts.

        Raises:
            ValueError: what they do to the model is nan.
        """
        self._decode(self.free.detach())
        if any(bool(each.objective.isnan().any()) for each in self.decoded.values()):
            raise ValueError("some of the model's activations are nan, so that no token is the best")

    def step(self) -> None:
        self.free.grad = self._gradient()
        self.optimiser.step()
        if self.prior == "softmax":
            self.free.data = self.free.data.softmax(-1)
        if self.steps % DECODE_EVERY == 0:
            self._decode(self.free.detach())

    def end(self) -> dict[str, Int[Tensor, "restart pos"]]:
        """Look at the last and at the best embeddings.

        Returns:
            The tokens that the best ones stand for, by decoding.
        """
        self._gradient()
        self._decode(self.free.detach())
        return self._decode(self.best)

    def embedded(self, free: Tensor) -> Float[Tensor, "restart pos d_model"]:
        return free @ self.space.E if self.prior == "softmax" else free

    # -- checkpoints -------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All that the next steps depend on, by the names in `TENSORS`; no step changes it."""
        kept = _kept(self.optimiser, self.free)
        decoded = {
            f"{way}_{field.name}": getattr(each, field.name)
            for way, each in self.decoded.items()
            for field in _DECODED
        }
        return decoded | {
            # the optimiser changes its own and these in place
            "free": self.free.detach().clone(),
            "optimiser": torch.cat(
                [torch.zeros(0, dtype=torch.float32), *(each.cpu().flatten() for each in kept)]
            ),
            "objectives": torch.stack(self.objectives, dim=1),
            "activations": torch.stack(self.activations, dim=1),
            "lowest": self.lowest,
            "best": self.best,
            "stalled": torch.tensor(self.stalled),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        # after a step, wherever it leads, the optimiser has tensors to copy into
        self.free.grad = torch.zeros_like(self.free)
        self.optimiser.step()
        kept = _kept(self.optimiser, self.free)
        parts = tensors["optimiser"].split([each.numel() for each in kept])
        for each, part in zip(kept, parts, strict=True):
            each.copy_(part.view_as(each))
        # a copy, since the optimiser changes it in place
        self.free.data = tensors["free"].to(self.free.device, copy=True)
        self.objectives = list(tensors["objectives"].unbind(1))
        self.activations = list(tensors["activations"].unbind(1))
        self.lowest = tensors["lowest"]
        self.best = tensors["best"].to(self.free.device)
        self.stalled = int(tensors["stalled"])
        for way in WAYS:
            self.decoded[way] = Decoded(*(tensors[f"{way}_{field.name}"] for field in _DECODED))

    # -- one step ----------------------------------------------------------------------------------

    def _gradient(self) -> Tensor:
        """The gradient of objective and penalty, and a note of where the restarts are."""
        free = self.free.detach()
        parts = self._in_parts(self._one_gradient, free)
        gradient, total, objective, activation = (torch.cat(each) for each in zip(*parts, strict=True))
        self.objectives.append(objective.cpu())
        self.activations.append(activation.cpu())
        total = total.cpu()
        better = total < self.lowest
        self.best = torch.where(better.to(free.device)[:, None, None], free, self.best)
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

    def _decode(self, free: Tensor) -> dict[str, Int[Tensor, "restart pos"]]:
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
        # more and more restarts stand for the same tokens
        rows, where = torch.cat([read[way] for way in WAYS]).unique(dim=0, return_inverse=True)
        parts = self._in_parts(self._run, rows)
        objective, activation = (torch.cat(each)[where].cpu() for each in zip(*parts, strict=True))
        found = zip(WAYS, objective.chunk(len(WAYS)), activation.chunk(len(WAYS)), strict=True)
        for way, objective, activation in found:
            read[way], old = read[way].cpu(), self.decoded.get(way)
            if old is not None:
                better = objective < old.objective
                self.decoded[way] = Decoded(
                    torch.where(better[:, None], read[way], old.ids),
                    torch.where(better, objective, old.objective),
                    torch.where(better, activation, old.activation),
                )
            else:
                self.decoded[way] = Decoded(read[way], objective, activation)
        return read

    def _run(self, ids: Int[Tensor, "row pos"]) -> tuple[Tensor, Tensor]:
        objective, activation = self.judge.judge_tokens(ids)
        return objective.detach(), activation.detach()

    def _in_parts(
        self, make: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """All restarts together, or as many as memory holds, which is remembered."""
        done = list(in_parts(make, rows, self.rows))
        if len(done) > 1:
            self.rows = len(done[0][0])
        return [made for _, made in done]


def _kept(optimiser: torch.optim.Optimizer, free: Tensor) -> list[Tensor]:
    """What an optimiser carries from step to step, always in the same order."""
    return [tensor for _, tensor in sorted(optimiser.state.get(free, {}).items())]
