"""Ablations by name, as grids of patches."""

from __future__ import annotations

from functools import partial

from mechlens.analyses.patching.grid import patch_grid
from mechlens.analyses.patching.sources import Earlier, Mean, Resampled, Source
from mechlens.models.protocol import LensModel
from mechlens.results import PatchGridResult
from mechlens.text.prompts import repeated_tokens


def ablate_mlps_from_first_half(
    model: LensModel,
    *,
    seq_len: int = 50,
    batch: int = 1,
    seed: int = 0,
    prepend_bos: bool | None = None,
    token_budget: int | None = None,
    progress: bool | None = None,
) -> PatchGridResult:
    """Replace each MLP's output at each position of the second copy by what it was in the first.

    Args:
        seq_len: random tokens in one copy; the model reads BOS, the copy and the same again.
        batch: sequences.
        seed: of the sequences.

    Returns:
        A grid of layer x position of the second copy. The metric is the mean loss of what the second copy's
        tokens predict, nats.

    Raises:
        ValueError: a model without MLPs, or sizes that do not fit the model.

    Source: the article "How one can Interpret GPT2-Small", "How do MLP layers attribute?".
    Cost: as `patch_grid`.
    """
    _check_length(seq_len)
    random = repeated_tokens(model, seq_len=seq_len, batch=batch, seed=seed, prepend_bos=prepend_bos)
    second = range(int(random.starts[0, 1]), random.tokens.shape[1])
    return patch_grid(
        model,
        random.tokens,
        site="mlp_out",
        source=Earlier(seq_len),
        positions=second,
        read=second[:-1],
        token_budget=token_budget,
        progress=progress,
    )


def ablate_heads(
    model: LensModel,
    *,
    how: str = "mean",
    seq_len: int = 50,
    batch: int = 4,
    seed: int = 0,
    prepend_bos: bool | None = None,
    token_budget: int | None = None,
    progress: bool | None = None,
) -> PatchGridResult:
    """Remove each attention head's output, at all positions, and measure the loss on the second copy.

    Args:
        how: `zero`; `mean`, the head's mean over 32 other random sequences, position by position; `resample`,
            its output on another random sequence.
        seq_len: random tokens in one copy; the model reads BOS, the copy and the same again.
        batch: sequences.
        seed: of the sequences; those that heads are replaced from have the next one.

    Returns:
        A grid of layer x head. The metric is the mean loss of what the second copy's tokens predict, nats:
        the heads that continue the copy have the largest effect.

    Raises:
        ValueError: another `how`, or sizes that do not fit the model.

    Cost: as `patch_grid`: a run from its own layer on for each head and sequence.
    """
    if how not in ("zero", "mean", "resample"):
        raise ValueError(f"how must be zero, mean or resample, but is {how!r}")
    _check_length(seq_len)
    random = repeated_tokens(model, seq_len=seq_len, batch=batch, seed=seed, prepend_bos=prepend_bos)
    draw = partial(repeated_tokens, model, seq_len=seq_len, prepend_bos=prepend_bos)
    source: Source = "zero"
    if how == "mean":
        source = Mean(draw(batch=32, seed=seed + 1).tokens)
    elif how == "resample":
        source = Resampled(draw(batch=batch, seed=seed + 1).tokens, seed=seed)
    second = range(int(random.starts[0, 1]), random.tokens.shape[1])
    return patch_grid(
        model,
        random.tokens,
        site="z",
        source=source,
        heads="each",
        positions=None,
        read=second[:-1],
        token_budget=token_budget,
        progress=progress,
    )


def _check_length(seq_len: int) -> None:
    if seq_len < 2:
        raise ValueError(
            f"seq_len must be at least 2, so that a token of the copy predicts another; it is {seq_len}"
        )
