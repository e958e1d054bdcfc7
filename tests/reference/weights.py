"""Measures of products of weights, from full float64 matrices."""

from __future__ import annotations

import torch


def dense(A, B):
    return torch.einsum("ri,ic->rc", A.double(), B.double())


def diagonal_ranks(matrix, over, ties):
    """One token at a time; `over` is `columns` (candidates within the token's row) or `rows`."""
    ranks = []
    for i in range(len(matrix)):
        line = (matrix[i] if over == "columns" else matrix[:, i]).tolist()
        own = line[i]
        others = [value for j, value in enumerate(line) if j != i]
        beaten_by = [value > own or (value == own and ties == "against") for value in others]
        ranks.append(1 + sum(beaten_by))
    return ranks


def accuracy(ranks, k, tokens, weights):
    hit = sum(weight for token, weight in zip(tokens, weights, strict=True) if ranks[token] <= k)
    return hit / sum(weights)


def largest_entries(matrix, n):
    entries = [
        (-float(matrix[row, column]), row, column)
        for row in range(matrix.shape[0])
        for column in range(matrix.shape[1])
    ]
    return [(row, column, -value) for value, row, column in sorted(entries)[:n]]


def eigenvalues(matrix):
    """Eigenvalues of the full matrix, including zeros."""
    return torch.linalg.eigvals(matrix)


def composition(A1, B1, A2, B2):
    """One pair of full matrices at a time."""
    scores = torch.empty(len(A1), len(A2), dtype=torch.double)
    for s in range(len(A1)):
        for t in range(len(A2)):
            M1, M2 = dense(A1[s], B1[s]), dense(A2[t], B2[t])
            product = torch.einsum("im,mo->io", M1, M2)
            scores[s, t] = product.norm() / (M1.norm() * M2.norm())
    return scores
