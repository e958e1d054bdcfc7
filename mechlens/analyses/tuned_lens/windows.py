"""The windows of text that a tuned lens is trained on, and those that are held out."""

from __future__ import annotations

from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.arguments import generator_of
from mechlens.models.protocol import LensModel
from mechlens.text.corpus import Corpus, token_windows

MOST_HELD_OUT = 64
"""The maximum number of windows held out by default."""


def training_windows(
    model: LensModel,
    corpus: Corpus | Int[Tensor, "window pos"],
    held_out_corpus: Corpus | Int[Tensor, "other pos"] | None,
    *,
    steps: int,
    batch_tokens: int,
    held_out: int | None,
) -> tuple[Int[Tensor, "train length"], Int[Tensor, "rest length"]]:
    """The windows to train on, and those to measure on.

    Raises:
        ValueError: there is too little text.
    """
    made = token_windows(model, corpus)
    found = list(islice(made, 1))
    if not found:
        raise ValueError("the corpus is shorter than one window: give more text, or shorter windows")
    length = len(found[0])
    per_step = max(1, batch_tokens // length)
    wanted = held_out or _share(steps * per_step, 9)
    apart = wanted if held_out_corpus is None else 0
    found += islice(made, steps * per_step + apart - 1)
    if held_out is None and apart:
        apart = _share(len(found), 10)
    if len(found) < per_step + apart:
        less = "batch_tokens" if held_out is None else "batch_tokens or held_out"
        raise ValueError(
            f"the corpus makes {len(found)} windows, but a batch takes {per_step}"
            + (f" and {apart} {'is' if apart == 1 else 'are'} held out" if apart else "")
            + f": give more text, shorter windows, or less {less}"
        )
    windows = torch.stack(found)
    if held_out_corpus is not None:
        rest = list(token_windows(model, held_out_corpus, length=length, limit=wanted))
        if not rest or len(rest[0]) != length:
            raise ValueError(f"held_out_corpus has no window of {length} tokens like corpus: give more text")
        return windows, torch.stack(rest)
    every = len(windows) // apart
    aside = torch.arange(apart) * every + every - 1
    kept = torch.ones(len(windows), dtype=torch.bool)
    kept[aside] = False
    return windows[kept], windows[aside]


def _share(windows: int, part: int) -> int:
    """The default number of held-out windows."""
    return max(1, min(MOST_HELD_OUT, windows // part))


def batch_windows(step: int, per_step: int, count: int, seed: int) -> Int[Tensor, " chosen"]:
    """The windows of a step: all windows once in random order, then again in a new order, and so on."""
    places = range(step * per_step, (step + 1) * per_step)
    orders = {
        epoch: torch.randperm(count, generator=generator_of(seed + epoch))
        for epoch in {place // count for place in places}
    }
    return torch.stack([orders[place // count][place % count] for place in places])
