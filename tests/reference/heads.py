"""Published head scores, one entry at a time."""

from __future__ import annotations

import math

import torch


def induction(pattern, seq_len, bos):
    """pattern: [dest][src] of one head on [BOS?, S, S]."""
    total = 0.0
    for k in range(seq_len):
        dest = bos + seq_len + k
        total += float(pattern[dest][bos + k + 1])
    return total / seq_len


def induction_diagonal(pattern, seq_len):
    """As in "How one can Interpret GPT2-Small": pattern.diagonal(offset=1 - seq_len).mean()."""
    entries = []
    for dest in range(len(pattern)):
        for src in range(len(pattern)):
            if src - dest == 1 - seq_len:
                entries.append(float(pattern[dest][src]))
    return sum(entries) / len(entries)


def duplicate(pattern, seq_len, bos):
    total = 0.0
    for k in range(seq_len):
        total += float(pattern[bos + seq_len + k][bos + k])
    return total / seq_len


def previous(pattern):
    total = 0.0
    for dest in range(1, len(pattern)):
        total += float(pattern[dest][dest - 1])
    return total / (len(pattern) - 1)


def first(pattern):
    total = 0.0
    for dest in range(1, len(pattern)):
        total += float(pattern[dest][0])
    return total / (len(pattern) - 1)


def prefix_matching(pattern, seq_len, copies, bos):
    entries = []
    for copy in range(1, copies):
        for earlier in range(copy):
            for k in range(seq_len):
                entries.append(float(pattern[bos + copy * seq_len + k][bos + earlier * seq_len + k + 1]))
    return sum(entries) / len(entries)


def copying(pattern, v, W_O, W_U, tokens, first_position):
    """One head on one sequence. pattern [dest][src], v [pos, d_head] without b_V, W_U with the norm."""
    sample = list(range(first_position, len(tokens)))
    weighted, weights = 0.0, 0.0
    for src in sample:
        logits = (v[src].double() @ W_O.double()) @ W_U.double()
        logits = logits - logits.mean()
        raised = {pos: max(0.0, float(logits[tokens[pos]])) for pos in sample}
        total = sum(raised.values())
        if total == 0:
            continue
        received = sum(float(pattern[dest][src]) for dest in sample)
        weighted += received * raised[src] / total
        weights += received
    return 2 * weighted / weights - 1 if weights else math.nan


def log_probs(logits, tokens):
    """[pos] log probability of each next token and whether it is the argmax, from full logits."""
    out, right = [], []
    for pos in range(len(tokens) - 1):
        row = logits[pos].double()
        out.append(float(torch.log_softmax(row, 0)[tokens[pos + 1]]))
        right.append(int(row.argmax()) == int(tokens[pos + 1]))
    return out, right


def sink(pattern):
    """The largest mean attention from all later positions to one that at least half of them follow."""
    n = len(pattern)
    means = []
    for src in range(n):
        later = [float(pattern[dest][src]) for dest in range(src + 1, n)]
        if 2 * len(later) >= n - 1:
            means.append(sum(later) / len(later))
    return max(means)
