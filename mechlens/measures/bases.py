"""Bases of an embedding matrix: its coordinates, principal axes, and a non-negative matrix factorization."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.measures.linear_maps import centered_product

NMF_TOKENS = 8192
"""Number of tokens, the most frequent ones, that a non-negative matrix factorization is fitted to."""
NMF_ITERATIONS = 600


@dataclasses.dataclass
class Basis:
    """Coordinates of the embedding's rows: a target for fitted maps."""

    name: str
    coefficients: Float[Tensor, "d_vocab element"]
    """Of every token, in float32, centered over the vocabulary (which does not change the nearest token)."""
    mean: Float[Tensor, " element"]
    directions: Float[Tensor, "element d_model"]
    importance: Float[Tensor, " element"]
    explained: float


def make_bases(
    W_E: Float[Tensor, "d_vocab d_model"],
    sizes: Mapping[str, int],
    counts: Int[Tensor, " d_vocab"],
    seed: int,
) -> tuple[list[Basis], bool | None]:
    """The coordinates of `W_E` themselves, then other bases of it.

    - `pca`: the eigenvectors of the covariance of `W_E`, by descending eigenvalue.
    - `nmf`: `[max(W_E, 0), max(-W_E, 0)] ≈ C H` with non-negative C and H, where each row of H has norm 1.
      An element is the direction of a row of `H[:, :d_model] - H[:, d_model:]`. H is fitted to the tokens
      with the largest counts.

    Args:
        sizes: number of elements of each basis.
        counts: how often each token occurs.
        seed: seed of the factorization.

    Returns:
        The bases, and whether `nmf` converged (None without it).

    References: Lee and Seung 1999, for non-negative matrix factorization; Kim and Tidor 2003, for splitting a
    matrix into its positive and negative parts.
    """
    covariance = centered_product(W_E, W_E)
    variance = covariance.diagonal()
    coordinates = torch.eye(W_E.shape[1], dtype=torch.double, device=W_E.device)
    made = [_basis("embedding", W_E, coordinates, variance / variance.sum(), 1.0)]
    converged = None
    for name, k in sizes.items():
        if name == "pca":
            values, vectors = torch.linalg.eigh(covariance)
            axes = vectors.flip(-1).T[:k]
            # the sign of an axis is arbitrary
            axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
            importance = values.flip(-1).clamp(min=0)[:k] / variance.sum()
            made.append(_basis(name, W_E @ axes.float().T, axes, importance, float(importance.sum())))
        else:
            C, H, converged = _factorize(W_E, k, counts, seed)
            signed = (H[:, : W_E.shape[1]] - H[:, W_E.shape[1] :]).double()
            left = (W_E - C @ signed.float()).double().pow(2).sum() / W_E.double().pow(2).sum()
            squares = C.double().pow(2).sum(0)
            directions = torch.nn.functional.normalize(signed, dim=1)
            made.append(_basis(name, C, directions, squares / squares.sum(), 1 - float(left)))
    return made, converged


def _basis(name: str, C: Tensor, directions: Tensor, importance: Tensor, explained: float) -> Basis:
    mean = C.double().mean(0)
    return Basis(name, (C - mean).float(), mean, directions, importance, explained)


def _factorize(
    W_E: Float[Tensor, "d_vocab d_model"], k: int, counts: Int[Tensor, " d_vocab"], seed: int
) -> tuple[Float[Tensor, "d_vocab element"], Float[Tensor, "element two_d_model"], bool]:
    """Non-negative factors of the embedding's positive and negative parts, largest element first."""
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    halves = torch.cat([W_E.clamp(min=0), (-W_E).clamp(min=0)], 1).cpu().numpy()
    often = counts.argsort(descending=True, stable=True)[:NMF_TOKENS].numpy()
    # a tenth of this tolerance would take twice the time and explain 0.001 more
    method = NMF(k, init="nndsvda", random_state=seed, max_iter=NMF_ITERATIONS, tol=1e-3)
    with warnings.catch_warnings():
        # reported in the result instead
        warnings.simplefilter("ignore", ConvergenceWarning)
        method.fit(halves[often])
        converged = method.n_iter_ < NMF_ITERATIONS
        C = torch.from_numpy(method.transform(halves)).to(W_E)
    H = torch.from_numpy(method.components_).to(W_E)
    norms = H.norm(dim=1)
    C, H = C * norms, H / norms.where(norms > 0, 1)[:, None]
    order = C.pow(2).sum(0).argsort(descending=True, stable=True)
    return C[:, order], H[order], converged


def by_basis(made: Sequence[Basis], joined: Tensor) -> dict[str, Tensor]:
    """Split by basis a tensor whose last axis has the elements of all bases side by side."""
    sizes = [basis.coefficients.shape[1] for basis in made]
    return dict(zip((basis.name for basis in made), joined.split(sizes, dim=-1), strict=True))
