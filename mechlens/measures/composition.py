"""Composition of two heads: how much of one head's output the other reads."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.arguments import generator_of
from mechlens.measures.weights import TILE_COLUMNS, TILE_ROWS, product, wide


def composition_scores(
    A1: Float[Tensor, "source input inner1"],
    B1: Float[Tensor, "source inner1 d_model"],
    A2: Float[Tensor, "destination d_model inner2"],
    B2: Float[Tensor, "destination inner2 output"],
    *,
    source_layers: Int[Tensor, " source"] | None = None,
    destination_layers: Int[Tensor, " destination"] | None = None,
) -> Float[Tensor, "source destination"]:
    """How much of one head's output another reads: `‖M1 M2‖ / (‖M1‖ ‖M2‖)`, with Frobenius norms.

    Args:
        A1, B1: thin factors of the sources' matrices `M1 = A1 @ B1`, for example `W_V` and `W_O`.
        A2, B2: thin factors of the destinations' `M2 = A2 @ B2`: `W_Q` and `W_K.mT` (Q-composition), `W_K`
            and `W_Q.mT` (K-composition), `W_V` and `W_O` (V-composition).
        source_layers, destination_layers: the layer of each matrix; give both or neither. With them, only
            pairs whose source is in an earlier layer than the destination are computed.

    Returns:
        In [0, 1]; about `d_model ** -0.5` for random matrices (see `random_composition`). nan where a matrix
        is zero, and for pairs that are not computed.

    Raises:
        ValueError: layers are given for one side only.

    References: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", in row-vector form
    and without subtracting the baseline.
    Cost: QR decompositions of the outer factors, then one product of all `[source * inner1, d_model]` with
    `[d_model, destination * inner2]`, in tiles.
    """
    if (source_layers is None) != (destination_layers is None):
        raise ValueError("give the layers of both sources and destinations, or neither")
    # Q in A1 = QR does not change the norm, nor does that of B2's transpose
    left = _of_norm_1(_triangle(wide(A1)) @ wide(B1))
    right = _of_norm_1(_triangle(wide(B2).mT) @ wide(A2).mT)
    scores = left.new_full((len(left), len(right)), torch.nan)
    if source_layers is None or destination_layers is None:
        pairs = [(torch.arange(len(left)), torch.arange(len(right)))]
    else:
        pairs = [
            ((source_layers == layer).nonzero()[:, 0], (destination_layers > layer).nonzero()[:, 0])
            for layer in source_layers.unique()
        ]
    room = left.new_empty(0)
    for sources, destinations in pairs:
        if len(destinations) == 0:
            continue
        for some in sources.to(left.device).split(max(1, TILE_ROWS // left.shape[1])):
            rows = rearrange(left[some], "source inner d_model -> (source inner) d_model")
            for others in destinations.to(left.device).split(max(1, TILE_COLUMNS // right.shape[1])):
                columns = rearrange(right[others], "dest inner d_model -> d_model (dest inner)")
                if room.numel() < len(rows) * columns.shape[1]:
                    room = left.new_empty(len(rows) * columns.shape[1])
                blocks = rearrange(
                    product(rows, columns, room),
                    "(source i) (dest j) -> source i dest j",
                    source=len(some),
                    dest=len(others),
                )
                scores[some[:, None], others] = torch.linalg.vector_norm(blocks, dim=(1, 3))
    return scores


def random_composition(d_model: int, d_head: int, *, n: int = 100, seed: int = 0) -> tuple[float, float]:
    """The composition score of heads with random weights.

    Args:
        n: independent pairs to draw, at least 2.

    Returns:
        Mean and standard deviation over pairs with Gaussian factors. The mean squared score is `1 / d_model`.

    Raises:
        ValueError: sizes below 1, or fewer than 2 pairs.

    Cost: the QR decompositions of 2 n factors `[d_model, d_head]`.
    """
    if min(d_model, d_head) < 1:
        raise ValueError(f"d_model and d_head must be at least 1, got {d_model} and {d_head}")
    if n < 2:
        raise ValueError(f"n must be at least 2 for a standard deviation, got {n}")
    generator = generator_of(seed)
    scores = []
    for _ in range(n):
        A1, A2 = torch.randn(2, 1, d_model, d_head, generator=generator, dtype=torch.float32)
        B1, B2 = torch.randn(2, 1, d_head, d_model, generator=generator, dtype=torch.float32)
        scores.append(float(composition_scores(A1, B1, A2, B2)))
    found = torch.tensor(scores, dtype=torch.double)
    return float(found.mean()), float(found.std())


def _triangle(matrices: Float[Tensor, "*batch row column"]) -> Float[Tensor, "*batch small column"]:
    return torch.linalg.qr(matrices, mode="r").R


def _of_norm_1(matrices: Float[Tensor, "batch row column"]) -> Float[Tensor, "batch row column"]:
    """Matrices divided by their Frobenius norms; nan where that is zero."""
    return matrices / torch.linalg.matrix_norm(matrices)[:, None, None]
