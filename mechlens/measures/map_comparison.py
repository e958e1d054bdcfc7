"""Compare fitted maps from the residual stream to the embedding with random maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.arguments import generator_of
from mechlens.measures.bases import Basis, by_basis
from mechlens.measures.linear_maps import Cosine, Fit, mean_and_range, random_orthogonal
from mechlens.measures.statistics import rank_correlation

COMPARED = ("similarity", "unembedding_similarity", "weight_correlation")


def compare_maps(
    W_E: Float[Tensor, "d_vocab d_model"],
    W_U: Float[Tensor, "other_vocab d_model"],
    made: Sequence[Basis],
    fits: Mapping[str, Fit],
    draws: int,
    seed: int,
) -> dict[str, dict[str, Tensor]]:
    """Compare fitted maps with the embedding and the unembedding, with random maps as nulls.

    As a map to logits, a fit is `M C.T`, `[d_model, d_vocab]`; C has the centered coefficients of all tokens.

    - `similarity`: the cosine (Frobenius) of that matrix with the centered `W_E.T`;
      `unembedding_similarity`: with `W_U`, nan if its vocabulary differs.
    - `weight`: where the map to the embedding reads the stream. For a unit direction g, an element of the
      basis, it is `var(x . g) |g M|^2`, as a share of the sum over elements. `weight_correlation`: the rank
      correlation of `weight` with the importance of g in `W_E`.
    - Nulls: the same for random maps `U diag(s) V.T` with M's singular values s and uniformly drawn
      orthogonal U and V: the mean, and the ends of the central 95% interval.

    Args:
        W_U: the unembedding, with the final norm's scale folded in.
        fits: maps to the coefficients of all bases side by side.
        draws: number of random maps for each null.

    Returns:
        By measure and basis, float64 tensors over the fits.
    """
    generator = generator_of(seed)
    maps = by_basis(made, torch.stack([fit.M for fit in fits.values()]))
    covariances = torch.stack([fit.covariance for fit in fits.values()])
    looks = [_InBasis(basis, maps, covariances, W_E, W_U) for basis in made]
    found = {"weight": {look.basis.name: look.weight for look in looks}}
    measured = {look.basis.name: look.measured() for look in looks}
    drawn: dict[str, list[Tensor]] = {look.basis.name: [] for look in looks}
    for _ in range(draws):
        U = random_orthogonal(W_E.shape[1], generator)
        for look in looks:
            V = random_orthogonal(len(look.basis.mean), generator)
            drawn[look.basis.name].append(look.random(U.to(W_E.device), V.to(W_E.device)))
    nulls = {name: mean_and_range(torch.stack(some)) for name, some in drawn.items()}
    for place, field in enumerate(COMPARED):
        found[field] = {name: values[place] for name, values in measured.items()}
        found[f"{field}_null"] = {name: values[place] for name, values in nulls.items()}
    return found


class _InBasis:
    """The measures of all maps in one basis, and those of random maps with the same singular values."""

    def __init__(
        self,
        basis: Basis,
        maps: Mapping[str, Float[Tensor, "fit d_model _"]],
        covariances: Float[Tensor, "fit d_model d_model"],
        W_E: Float[Tensor, "d_vocab d_model"],
        W_U: Float[Tensor, "other_vocab d_model"],
    ) -> None:
        self.basis, self.M = basis, maps[basis.name]
        self.cosines = [Cosine(basis.coefficients, W_E)]
        if len(W_U) == len(W_E):
            self.cosines.append(Cosine(basis.coefficients, W_U))
        self.singular = torch.linalg.svdvals(self.M)
        self.strength = torch.linalg.svdvals(maps["embedding"]).pow(2)
        D = basis.directions
        self.variance = ((D @ covariances) * D).sum(-1)
        weight = self.variance * (D @ maps["embedding"]).pow(2).sum(-1)
        self.weight = weight / weight.sum(-1, keepdim=True)

    def measured(self) -> Float[Tensor, "3 fit"]:
        return self._joined([cosine(self.M) for cosine in self.cosines], self.weight)

    def random(
        self, U: Float[Tensor, "d_model d_model"], V: Float[Tensor, "element element"]
    ) -> Float[Tensor, "3 fit"]:
        # |g U diag(s) V.T|^2 does not depend on V
        weight = self.variance * (self.strength @ (self.basis.directions @ U).pow(2).T)
        return self._joined([cosine.of_factors(U, self.singular, V) for cosine in self.cosines], weight)

    def _joined(self, cosines: list[Tensor], weight: Tensor) -> Tensor:
        correlation = rank_correlation(weight, self.basis.importance.expand_as(weight))
        absent = [torch.full_like(correlation, torch.nan)] * (2 - len(cosines))
        return torch.stack([*cosines, *absent, correlation])
