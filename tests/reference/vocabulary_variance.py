"""Variance across layers by final rank, one position and token at a time, from full logits in float64."""

from __future__ import annotations

import statistics


def by_bin(logits, bins, ranking=None):
    """For one position; the last row of `logits` [row][token] is final. `ranking`: other final logits.

    Returns the variance by bin and, by row and bin, the mean, the spread and the distance to the last row.
    """
    centered = [[value - statistics.fmean(row) for value in row] for row in logits]
    final = list(logits[-1] if ranking is None else ranking)
    order = sorted(range(len(final)), key=lambda token: (-final[token], token))
    variance, rows = [], []
    for first, last in bins:
        tokens = order[first - 1 : last]
        variance.append(
            statistics.fmean(statistics.pvariance([row[t] for row in centered[1:]]) for t in tokens)
        )
    for row in centered:
        line = []
        for first, last in bins:
            tokens = order[first - 1 : last]
            values = [row[t] for t in tokens]
            away = statistics.fmean(abs(row[t] - centered[-1][t]) for t in tokens)
            line.append((statistics.fmean(values), statistics.pstdev(values), away))
        rows.append(line)
    return variance, rows
