"""What kinds of heads carry a task: where they attend to, and what they do by their weights."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.arguments import check_counts, check_type
from mechlens.models.protocol import describe
from mechlens.models.run.forward import parts, read_patterns
from mechlens.results import CopyScores, EdgeEffects, HeadScores, TaskHeads, parse_head
from mechlens.results.copying import SHARES

if TYPE_CHECKING:
    from mechlens.analyses.tasks.task import Task


def head_kinds(
    task: Task, effects: EdgeEffects, copying: CopyScores | None, scores: HeadScores | None, *, top: int
) -> TaskHeads:
    """`Task.heads`."""
    check_type("effects", effects, EdgeEffects)
    check_counts(top=top)
    every = effects.top_nodes(len(effects.senders), absolute=True)
    labels = [name for name in every if not name.endswith(".mlp")][:top]
    heads = [parse_head(label) for label in labels]
    at = tuple(torch.tensor(heads).T)
    found: dict[str, Tensor] = {}
    nulls: dict[str, Tensor] = {}
    if copying is not None:
        check_type("copying", copying, CopyScores)
        for name in SHARES:
            found[name], nulls[name] = (getattr(copying, f"{before}{name}")[at] for before in ("", "null_"))
    if scores is not None:
        check_type("scores", scores, HeadScores)
        known = [name for name in scores.kinds if name in scores.nulls]
        found |= {name: scores.mean(name)[at].float() for name in known}
        nulls |= {name: scores.null(name)[at].float() for name in known}
    nodes = dict(zip(effects.senders, effects.nodes.tolist(), strict=True))
    roles = task.shared_roles
    return TaskHeads(
        model=describe(task.model),
        task=task.name,
        counterfactual=task.counterfactual,
        prompts=tuple(prompt.clean for prompt in task.prompts),
        heads=tuple(heads),
        by=effects.by,
        metric=effects.metric,
        effect=torch.tensor([nodes[label] for label in labels], dtype=torch.float32),
        roles=roles,
        attention=_attention(task, roles)[at].float(),
        scores=found,
        nulls=nulls,
        note=effects.note,
    )


def _attention(task: Task, roles: tuple[str, ...]) -> Float[Tensor, "layer head role"]:
    """Mean attention of the last position to each role's."""
    info = describe(task.model)
    total = torch.zeros(info.n_layers, info.n_heads, len(roles), dtype=torch.double)

    def add(layer: int, pattern: Tensor, positions: Tensor) -> None:
        rows = torch.arange(len(pattern))
        for column in range(len(roles)):
            seen = pattern[rows, :, -1, positions[:, column].to(pattern.device)]
            total[layer, :, column] += seen.double().sum(0).cpu()

    for group in task.groups:
        positions = torch.tensor([[task.encoded[at].roles[role] for role in roles] for at in group.index])
        start = 0
        for part in parts(group.tokens):
            some = positions[start : start + len(part)]
            read_patterns(task.model, part, partial(add, positions=some))
            start += len(part)
    return total / len(task.prompts)
