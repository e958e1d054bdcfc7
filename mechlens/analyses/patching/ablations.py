"""Ablate heads and MLPs on repeated random tokens, as grids of patches."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.analyses.patching.experiment import Patching
from mechlens.analyses.patching.metrics import Loss
from mechlens.analyses.patching.sources import Earlier, Mean, Resampled, Source, Zero
from mechlens.arguments import check_type, seeds_of
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel
from mechlens.results import PatchGridResult
from mechlens.text.prompts import RepeatedTokens

REFERENCE = 32
"""Sequences whose mean replaces an ablated head's output."""
HOW = ("mean", "zero", "resample")


def ablate_mlps(
    model: LensModel, *, on: RepeatedTokens | None = None, progress: bool | None = None
) -> PatchGridResult:
    """Replace each MLP's output at each position of the second copy with that at the same token in the first.

    Args:
        on: the repeated random tokens, without jitter; None is `RepeatedTokens(50, batch=4, seeds=[0])`.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        A grid of layer x position in the second copy. The metric is the mean loss on the second copy's tokens
        except the first, in nats.

    Raises:
        ValueError: a model without MLPs, jitter, or sequences that do not fit in the model's context.

    Example:
        >>> mechlens.ablate_mlps(model, on=mechlens.RepeatedTokens(8, batch=1, seeds=[0])).effect.shape
        torch.Size([4, 8])

    References: "How one can Interpret GPT2-Small", section "How do MLP layers attribute?".
    Cost: one forward pass for each sequence, and for each layer and position the rest of the run after it.
    """
    on = _checked(on)
    tokens, second = second_copy(model, on)
    experiment = Patching(model, tokens, metric=Loss(at=second[:-1]), progress=progress)
    return experiment.grid("mlp_out", values=Earlier(on.seq_len), positions=second)


def ablate_heads(
    model: LensModel, how: str = "mean", *, on: RepeatedTokens | None = None, progress: bool | None = None
) -> PatchGridResult:
    """Ablate each attention head's output at all positions, and measure the loss on the second copy.

    Args:
        how: `zero`; `mean`, the head's mean output over 32 other random sequences, position by position; or
            `resample`, its output on another random sequence.
        on: the repeated random tokens, without jitter; None is `RepeatedTokens(50, batch=4, seeds=[0])`. The
            other sequences are drawn with the seeds after the last one.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        A grid of layer x head. The metric is the mean loss on the second copy's tokens except the first, in
        nats: the heads that continue the copy have the largest effects.

    Raises:
        ValueError: an unknown `how`, jitter, or sequences that do not fit in the model's context.

    Example:
        >>> found = mechlens.ablate_heads(model, "zero", on=mechlens.RepeatedTokens(10, batch=1, seeds=[0]))
        >>> found.axes
        ('layer', 'head')

    References: Olsson et al. 2022, "In-context Learning and Induction Heads", arXiv:2209.11895.
    Cost: one forward pass for each sequence, and for each head the layers after it.
    """
    on = _checked(on)
    source = ablation_source(model, how, on)
    tokens, second = second_copy(model, on)
    experiment = Patching(model, tokens, metric=Loss(at=second[:-1]), progress=progress)
    return experiment.grid("z", values=source, over=("layer", "head"))


def ablation_source(model: LensModel, how: str, on: RepeatedTokens) -> Source:
    """What replaces an ablated head's output: zero, or values from sequences with later seeds."""
    check_how(how)
    if how == "zero":
        return Zero()
    seeds = seeds_of(on.seeds)
    if how == "mean":
        return Mean(dataclasses.replace(on, batch=REFERENCE).draw(model, seeds[-1] + 1).tokens)
    other = torch.cat([on.draw(model, seeds[-1] + 1 + at).tokens for at in range(len(seeds))])
    return Resampled(other, seed=seeds[-1])


def check_how(how: str) -> None:
    if how not in HOW:
        raise ArgumentError("how", f"one of {', '.join(HOW)}", how)


def _checked(on: RepeatedTokens | None) -> RepeatedTokens:
    on = RepeatedTokens(50, batch=4, seeds=[0]) if on is None else on
    check_type("on", on, RepeatedTokens)
    if on.seq_len < 2:
        raise ArgumentError("seq_len", "at least 2, so that a token of the copy predicts another", on.seq_len)
    if on.jitter:
        raise ArgumentError("jitter", "0, because copies are compared position by position", on.jitter)
    return on


def second_copy(model: LensModel, on: RepeatedTokens) -> tuple[Int[Tensor, "prompt pos"], range]:
    """The sequences of all seeds, and the positions of the second copy."""
    drawn = [on.draw(model, seed) for seed in seeds_of(on.seeds)]
    tokens = torch.cat([each.tokens for each in drawn])
    return tokens, range(int(drawn[0].starts[0, 1]), tokens.shape[1])
