"""Linear maps: least-squares fits, and their cosine with another matrix, with random maps as a null."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechlens.measures.unembedding import Unembedding


@dataclasses.dataclass
class Fit:
    """A linear map `x @ M + b`, and the covariance of the inputs it was fitted to, in float64."""

    M: Float[Tensor, "d_model target"]
    b: Float[Tensor, " target"]
    covariance: Float[Tensor, "d_model d_model"]


class Moments:
    """The sums over samples that determine a least-squares fit, in float64."""

    def __init__(self, d_model: int, targets: int, place: torch.device) -> None:
        self.n = 0
        self.x, self.y = (torch.zeros(size, dtype=torch.double, device=place) for size in (d_model, targets))
        self.xx = torch.zeros(d_model, d_model, dtype=torch.double, device=place)
        self.xy = torch.zeros(d_model, targets, dtype=torch.double, device=place)

    def add(self, X: Float[Tensor, "n d_model"], Y: Float[Tensor, "n target"]) -> None:
        self.n += len(X)
        self.x += X.sum(0)
        self.y += Y.sum(0)
        self.xx.addmm_(X.T, X)
        self.xy.addmm_(X.T, Y)

    def merge(self, other: Moments) -> None:
        """Add the sums of other samples."""
        self.n += other.n
        for own, more in ((self.x, other.x), (self.y, other.y), (self.xx, other.xx), (self.xy, other.xy)):
            own += more

    def fit(self, ridge: float) -> Fit:
        """The least-squares map with intercept.

        Args:
            ridge: added to the diagonal of the covariance, in units of the mean variance; 0 gives the
                minimum-norm solution.
        """
        x, y = self.x / self.n, self.y / self.n
        covariance = self.xx / self.n - x.outer(x)
        values, Q = torch.linalg.eigh(covariance)
        # leave out directions with nothing but float32 rounding: a centered stream has one
        real = values > len(values) * torch.finfo(torch.float32).eps ** 2 * values[-1]
        inverse = (1 / (values + ridge * values.mean())).where(real, 0)
        M = Q @ (inverse[:, None] * (Q.T @ (self.xy / self.n - x.outer(y))))
        return Fit(M, y - x @ M, covariance)


def centered_product(a: Float[Tensor, "n i"], b: Float[Tensor, "n j"]) -> Float[Tensor, "i j"]:
    """`a.T @ b` of centered columns in float64, without a float64 copy of either."""
    mean_a, mean_b = (x.sum(0, dtype=torch.double) / len(x) for x in (a, b))
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.double, device=a.device)
    for some_a, some_b in zip(a.split(4096), b.split(4096), strict=True):
        total += (some_a - mean_a).T @ (some_b - mean_b)
    return total


def nearest(
    guesses: Float[Tensor, "n element"], C: Float[Tensor, "d_vocab element"], ids: Int[Tensor, " n"]
) -> Bool[Tensor, " n"]:
    """Whether no row of C is closer to a guess than its own token's row."""
    # |c|^2 / 2 - g . c is half the squared distance, up to a constant
    return Unembedding(C.T, -C.pow(2).sum(1) / 2).log_prob(guesses, ids)[1]


class Cosine:
    """The cosine of `M C.T` with `A.T`, both `[d_model, d_vocab]` and never built. C's and A's columns are
    centered first."""

    def __init__(self, C: Float[Tensor, "d_vocab element"], A: Float[Tensor, "d_vocab d_model"]) -> None:
        self.cross, self.gram = centered_product(A, C), centered_product(C, C)
        mean = A.sum(0, dtype=torch.double) / len(A)
        self.norm = torch.stack([(some - mean).pow(2).sum() for some in A.split(4096)]).sum().sqrt()

    def __call__(self, M: Float[Tensor, "fit d_model element"]) -> Float[Tensor, " fit"]:
        both = (M * self.cross).sum((1, 2))
        return both / (((M @ self.gram) * M).sum((1, 2)).sqrt() * self.norm)

    def of_factors(
        self,
        U: Float[Tensor, "d_model d_model"],
        singular: Float[Tensor, "fit element"],
        V: Float[Tensor, "element element"],
    ) -> Float[Tensor, " fit"]:
        """The same for `M = U diag(singular) V.T`, without one matrix product per fit."""
        both = singular @ (U[:, : len(V)] * (self.cross @ V)).sum(0)
        return both / ((singular.pow(2) @ (V * (self.gram @ V)).sum(0)).sqrt() * self.norm)


def random_orthogonal(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """An orthogonal matrix, drawn uniformly.

    References: Mezzadri 2007, arXiv:math-ph/0609050, for the signs.
    """
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.double))
    return Q * R.diagonal().sign()


def mean_and_range(draws: Float[Tensor, "draw measure fit"]) -> Float[Tensor, "measure fit 3"]:
    """The mean over draws, and the ends of the central 95% interval."""
    ends = draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype, device=draws.device), dim=0)
    return torch.stack([draws.mean(0), *ends], -1)
