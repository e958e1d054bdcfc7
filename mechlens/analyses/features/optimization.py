"""How gradient search updates embeddings and decodes them to tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.features.objectives import Objective
from mechlens.arguments import check_reals, whole_number
from mechlens.errors import ArgumentError
from mechlens.measures.memory import in_parts

OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")
PENALTIES = ("norm", "nearest")
PRIORS = ("softmax", *PENALTIES)
FASTEST = 1e6
"""Maximum learning rate: larger steps overflow float32 inside torch's optimizers."""
DECODE_EVERY = 5
"""Steps between decodings of the embeddings."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How a gradient search updates embeddings.

    Args:
        name: a torch optimizer: Adadelta, Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop or SGD.
        learning_rate: in units of the root mean square of real embeddings' elements, except with the softmax
            prior, where it is used unchanged.
        steps: the maximum number of steps.
        patience: stop when no restart has improved for this many steps.
        restarts: independent starts, run as one batch, or in parts if memory runs out.

    Raises:
        TypeError: a value of the wrong type.
        ArgumentError: an unknown optimizer, a number below 1, or a learning rate that is not above 0 and at
            most 1e6.

    Example:
        >>> mechlens.Optimizer("SGD", learning_rate=0.5, restarts=8).steps
        40
    """

    name: str = "Adam"
    learning_rate: float = 0.1
    steps: int = 40
    patience: int = 10
    restarts: int = 64

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ArgumentError("optimizer", f"one of {', '.join(OPTIMIZERS)}", self.name)
        for name in ("steps", "patience", "restarts"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least=1))
        check_reals(learning_rate=self.learning_rate)
        if not 0 < self.learning_rate <= FASTEST:
            raise ArgumentError("learning_rate", f"above 0 and at most {FASTEST:g}", self.learning_rate)


@dataclasses.dataclass(frozen=True)
class Prior:
    """What keeps the embeddings of a gradient search close to real ones.

    Args:
        name: `softmax` optimizes a distribution over tokens, renormalized by a softmax after each step, as in
            Badger's "Language Model Features". It is slow with the default optimizer: try SGD with a learning
            rate of 100. `norm` and `nearest` add a penalty, summed over the searched tokens: the squared
            relative difference between an embedding's norm and the mean norm of real ones, or 1 minus the
            cosine with the nearest real one.
        weight: the factor of the penalty.

    Raises:
        TypeError: a weight that is not a number.
        ArgumentError: an unknown prior, a negative weight, or a weight for `softmax`.

    Example:
        >>> mechlens.Prior("norm").weight
        1.0
    """

    name: str
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.name not in PRIORS:
            raise ArgumentError("prior", f"one of {', '.join(PRIORS)}", self.name)
        check_reals(weight=self.weight)
        if self.weight is not None and self.name not in PENALTIES:
            raise ArgumentError("weight", f"None with the prior {self.name}", self.weight)
        if self.weight is not None and self.weight < 0:
            raise ArgumentError("weight", "at least 0", self.weight)
        if self.weight is None and self.name in PENALTIES:
            object.__setattr__(self, "weight", 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """The real embeddings, with what decoding needs."""

    E: Float[Tensor, "d_vocab d_model"]
    unit: Float[Tensor, "d_vocab d_model"]
    inverse: Float[Tensor, "d_model d_model"]
    """Inverse of `E.T @ E`; times `E.T`, it is the pseudo-inverse of `E`."""
    norm: float

    @classmethod
    def of(cls, E: Float[Tensor, "d_vocab d_model"]) -> Space:
        # float64, because the Gram matrix squares the embedding's condition number
        wide = E.double()
        inverse = torch.linalg.pinv(wide.T @ wide, hermitian=True).float()
        return cls(E, torch.nn.functional.normalize(E, dim=-1), inverse, float(E.norm(dim=-1).mean()))

    def coefficients(self, embedded: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """The minimum-norm token weights that sum to each embedding, from the pseudo-inverse."""
        return embedded @ self.inverse @ self.E.T

    def cosines(self, embedded: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        return torch.nn.functional.normalize(embedded, dim=-1) @ self.unit.T

    def between_tokens(self) -> float:
        """Mean cosine between a real embedding and the nearest other one, over at most 1000 embeddings."""
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
    """The best tokens that each restart was decoded to, by their own objective."""

    ids: Int[Tensor, "restart pos"]
    objective: Float[Tensor, " restart"]
    activation: Float[Tensor, " restart"]


WAYS = ("pinv", "nearest")
_DECODED = dataclasses.fields(Decoded)
TENSORS = (
    *("free", "optimizer", "objectives", "activations", "lowest", "best", "stalled"),
    *(f"{way}_{field.name}" for way in WAYS for field in _DECODED),
)
"""The tensors of a checkpoint."""


class Optimization:
    """The state of all restarts."""

    def __init__(
        self,
        objective: Objective,
        space: Space,
        prior: Prior | None,
        free: Float[Tensor, "restart pos width"],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """`free` is what is optimized: embeddings, or distributions over tokens."""
        self.objective, self.space = objective, space
        self.prior = None if prior is None else prior.name
        self.weight = 0.0 if prior is None or prior.weight is None else prior.weight
        self.free, self.optimizer = free, optimizer
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
        """Decode the starting embeddings.

        Raises:
            ValueError: some activations are nan.
        """
        self._decode(self.free.detach())
        if any(bool(each.objective.isnan().any()) for each in self.decoded.values()):
            raise ValueError("some of the model's activations are nan, so no token is the best")

    def step(self) -> None:
        self.free.grad = self._gradient()
        self.optimizer.step()
        if self.prior == "softmax":
            self.free.data = self.free.data.softmax(-1)
        if self.steps % DECODE_EVERY == 0:
            self._decode(self.free.detach())

    def end(self) -> dict[str, Int[Tensor, "restart pos"]]:
        """Decode the last and the best embeddings.

        Returns:
            The tokens decoded from the best embeddings, by decoding method.
        """
        self._gradient()
        self._decode(self.free.detach())
        return self._decode(self.best)

    def embedded(self, free: Tensor) -> Float[Tensor, "restart pos d_model"]:
        return free @ self.space.E if self.prior == "softmax" else free

    # -- checkpoints -------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The full state, by the names in `TENSORS`. Later steps do not change these tensors."""
        kept = _kept(self.optimizer, self.free)
        decoded = {
            f"{way}_{field.name}": getattr(each, field.name)
            for way, each in self.decoded.items()
            for field in _DECODED
        }
        return decoded | {
            # copies, because the optimizer updates these and its own state in place
            "free": self.free.detach().clone(),
            "optimizer": torch.cat(
                [torch.zeros(0, dtype=torch.float32), *(each.cpu().flatten() for each in kept)]
            ),
            "objectives": torch.stack(self.objectives, dim=1),
            "activations": torch.stack(self.activations, dim=1),
            "lowest": self.lowest,
            "best": self.best,
            "stalled": torch.tensor(self.stalled),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore from a checkpoint."""
        # any step creates the optimizer's tensors, which are then overwritten
        self.free.grad = torch.zeros_like(self.free)
        self.optimizer.step()
        kept = _kept(self.optimizer, self.free)
        parts = tensors["optimizer"].split([each.numel() for each in kept])
        for each, part in zip(kept, parts, strict=True):
            each.copy_(part.view_as(each))
        # a copy, because the optimizer updates it in place
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
        """The gradient of the objective plus penalty. Records the objectives and the best embeddings."""
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
        objective, activation = self.objective(embedded)
        total = objective
        if self.prior == "norm":
            total = total + self.weight * (embedded.norm(dim=-1) / self.space.norm - 1).square().sum(-1)
        elif self.prior == "nearest":
            total = total + self.weight * (1 - self.space.cosines(embedded).amax(-1)).sum(-1)
        (gradient,) = torch.autograd.grad(total.sum(), [free])
        return gradient, total.detach(), objective.detach(), activation.detach()

    def _decode(self, free: Tensor) -> dict[str, Int[Tensor, "restart pos"]]:
        """Decode the embeddings to tokens, run these, and keep the best so far.

        Returns:
            The tokens, by decoding method.
        """
        embedded = self.embedded(free)
        ways = {
            # a distribution over tokens needs no decoding
            "pinv": free if self.prior == "softmax" else self.space.coefficients(embedded),
            "nearest": self.space.cosines(embedded),
        }
        read = {way: likeness.argmax(-1) for way, likeness in ways.items()}
        # many restarts are decoded to the same tokens
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
        objective, activation = self.objective.of_tokens(ids)
        return objective.detach(), activation.detach()

    def _in_parts(
        self, make: Callable[[Tensor], tuple[Tensor, ...]], rows: Tensor
    ) -> list[tuple[Tensor, ...]]:
        """Run all restarts together, or as many as fit in memory; later calls run as many at a time."""
        done = list(in_parts(make, rows, self.rows))
        if len(done) > 1:
            self.rows = len(done[0][0])
        return [made for _, made in done]


def _kept(optimizer: torch.optim.Optimizer, free: Tensor) -> list[Tensor]:
    """An optimizer's state tensors, always in the same order."""
    return [tensor for _, tensor in sorted(optimizer.state.get(free, {}).items())]
