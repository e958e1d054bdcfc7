"""Prompts of one length, which can run together."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.text.task_prompts import EncodedPrompt


@dataclasses.dataclass(frozen=True, eq=False)
class TaskGroup:
    """Prompts of one length, which can run together."""

    index: tuple[int, ...]
    """Their indices in the task."""
    tokens: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"]


def grouped(prompts: Sequence[EncodedPrompt]) -> tuple[TaskGroup, ...]:
    by_length: dict[int, list[int]] = defaultdict(list)
    for at, prompt in enumerate(prompts):
        by_length[prompt.clean.shape[1]].append(at)
    groups = []
    for _, index in sorted(by_length.items()):
        some = [prompts[at] for at in index]
        clean, corrupted = (
            torch.cat([getattr(each, name) for each in some]) for name in ("clean", "corrupted")
        )
        groups.append(TaskGroup(tuple(index), clean, corrupted))
    return tuple(groups)
