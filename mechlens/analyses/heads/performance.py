"""How well a model predicts random tokens that are repeated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mechlens.arguments import check_type
from mechlens.measures.statistics import bootstrap_interval, central_interval
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.unembedding import next_token_log_probs
from mechlens.progress import progress_bar
from mechlens.results import RepeatedTokenPerformance, half_means
from mechlens.text.prompts import DEFAULT_REPEATED, RandomTokens, RepeatedTokens


def repeated_token_performance(
    model: LensModel,
    on: RepeatedTokens = DEFAULT_REPEATED,
    *,
    confidence: float = 0.95,
    progress: bool | None = None,
) -> RepeatedTokenPerformance:
    """Measure how well the model predicts random tokens at their first and at their second occurrence.

    Args:
        on: the sequences `[BOS, S tokens, the same S]` to draw; `jitter` must be 0. Without BOS nothing
            predicts the first token, so the first half has S - 1 predictions.
        confidence: coverage of the bootstrap intervals over all sequences, between 0 and 1.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        Log-probabilities (nats) and top-1 hits at each position, and their means over each half with
        intervals. The first token of the second copy counts in the second half although it cannot be
        predicted, as in "How one can Interpret GPT2-Small". So the best possible accuracy is about
        (S - 1) / S.

    Raises:
        ValueError: the sequences do not fit in the model's context, or `jitter` is not 0.

    Example:
        >>> on = mechlens.RepeatedTokens(20, batch=4, seeds=[0])
        >>> found = mechlens.repeated_token_performance(model, on)
        >>> found.estimates["second_half_accuracy"][0] > 0.8  # mean, low, high
        True

    References: "How one can Interpret GPT2-Small"; Olsson et al. 2022, arXiv:2209.11895.
    Cost: one forward pass per seed; no logits are kept.
    """
    check_type("on", on, RepeatedTokens)
    if on.jitter:
        raise ValueError(f"the two halves need a fixed period: use jitter=0, got {on.jitter}")
    drawn, predicted = [], []
    for seed in progress_bar(on.seeds, desc="repeated tokens", progress=progress):
        drawn.append(on.draw(model, seed))
        predicted.append(next_token_log_probs(model, drawn[-1].tokens))
    return performance_of(model, drawn, predicted, confidence)


def performance_of(
    model: LensModel,
    drawn: Sequence[RandomTokens],
    predicted: Sequence[tuple[Tensor, Tensor]],
    confidence: float,
) -> RepeatedTokenPerformance:
    """The result, from the log-probabilities and top-1 hits of each seed."""
    seq_len, prepend_bos = drawn[0].seq_len, drawn[0].prepend_bos
    log_prob, correct = (torch.stack(each) for each in zip(*predicted, strict=True))
    estimates, single_draws = {}, {}
    for half in ("first", "second"):
        for name, values in (("log_prob", log_prob), ("accuracy", correct.float())):
            means = half_means(values, half, seq_len=seq_len, prepend_bos=prepend_bos).flatten()
            low, high = bootstrap_interval(means, confidence=confidence)
            estimates[f"{half}_half_{name}"] = (float(means.mean()), float(low), float(high))
            single_draws[f"{half}_half_{name}"] = central_interval(means)
    return RepeatedTokenPerformance(
        model=describe(model),
        tokens=torch.stack([random.tokens for random in drawn]),
        log_prob=log_prob,
        correct=correct,
        estimates=estimates,
        single_draws=single_draws,
        seq_len=seq_len,
        seeds=tuple(random.seed for random in drawn),
        prepend_bos=prepend_bos,
        confidence=confidence,
    )
