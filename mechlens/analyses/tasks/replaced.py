"""What components write where they are not kept: a counterfactual's value, a mean, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.arguments import names_of
from mechlens.models.run.edge_runs import Written

if TYPE_CHECKING:
    from mechlens.analyses.tasks.task import Task

BY = ("resample", "mean", "zero")


def replacements(task: Task, by: str) -> list[Written]:
    """For each of the task's groups of prompts, what replaced components write.

    Means are over the corrupted prompts, by role: a position's place is the last role at or before it and the
    distance to that role, so that prompts of other templates and lengths meet.

    Cost: one forward pass of each corrupted prompt.
    """
    (by,) = names_of("by", by, BY)
    there = [Written.of(task.model, group.corrupted) for group in task.groups]
    if by == "zero":
        return [each.map(torch.zeros_like) for each in there]
    if by == "resample":
        return there
    places = _places(task)
    return [
        Written(
            _mean(places, [each.embed for each in there], at),
            [_mean(places, [each.z[layer] for each in there], at) for layer in range(len(there[0].z))],
            [
                _mean(places, [each.mlp_out[layer] for each in there], at)
                for layer in range(len(there[0].mlp_out))
            ],
        )
        for at in range(len(there))
    ]


def _places(task: Task) -> list[Int[Tensor, "prompt pos"]]:
    """By group, the number of each position's place."""
    numbers: dict[tuple[str, int], int] = {}
    found = []
    for group in task.groups:
        rows = []
        for at in group.index:
            roles = {position: role for role, position in task.encoded[at].roles.items()}
            row, role, begin = [], "", 0
            for position in range(group.tokens.shape[1]):
                if position in roles:
                    role, begin = roles[position], position
                row.append(numbers.setdefault((role, position - begin), len(numbers)))
            rows.append(row)
        found.append(torch.tensor(rows))
    return found


def _mean(places: list[Tensor], values: list[Tensor], at: int) -> Tensor:
    """At each position of one group, the mean over all positions with the same place."""
    n = 1 + max(int(each.max()) for each in places)
    total = values[0].new_zeros(n, *values[0].shape[2:], dtype=torch.float32)
    seen = total.new_zeros(n)
    for each, some in zip(places, values, strict=True):
        index = each.flatten().to(total.device)
        total.index_add_(0, index, some.flatten(0, 1).float())
        seen.index_add_(0, index, torch.ones_like(index, dtype=torch.float32))
    means = total / seen.clamp(min=1).view(-1, *[1] * (total.ndim - 1))
    return means[places[at].to(total.device)].to(values[at].dtype)
