"""The logit lens's statistics from full distributions, one vector at a time."""

from __future__ import annotations

import torch


def statistics(logits, reference_logits, target):
    """For one vector: entropy, KL(reference || this), rank and log probability of a target, in float64."""
    this = torch.distributions.Categorical(logits=logits.double())
    other = torch.distributions.Categorical(logits=reference_logits.double())
    order = torch.argsort(logits, descending=True).tolist()
    return {
        "entropy": float(this.entropy()),
        "kl": float(torch.distributions.kl_divergence(other, this)),
        "rank": 1 + order.index(int(target)),
        "log_prob": float(torch.log_softmax(logits.double(), 0)[target]),
        "order": order,
        "probabilities": torch.softmax(logits.double(), 0),
    }
