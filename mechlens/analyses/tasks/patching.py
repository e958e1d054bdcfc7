"""Patch a task's positions by role, such as the second subject, wherever it occurs in a prompt."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mechlens.analyses.patching import LogitDiff, Patching
from mechlens.arguments import names_of
from mechlens.models.protocol import describe
from mechlens.results.tasks import RoleGrid

if TYPE_CHECKING:
    from mechlens.analyses.tasks.task import Task


def patch_roles(
    task: Task,
    site: str,
    *,
    into: str | None,
    values: Any,
    layers: Sequence[int] | None,
    roles: Sequence[str] | None,
    progress: bool | None,
) -> RoleGrid:
    """`Task.grid`. Prompts with the same length and role positions run together."""
    names = _roles(task, roles)
    together: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for at, prompt in enumerate(task.encoded):
        if (len(prompt.answers), len(prompt.wrong)) != (1, 1):
            raise ValueError(
                "patching a task needs exactly one right and one wrong answer for each prompt, but "
                f"{task.prompts[at].clean!r} has {len(prompt.answers)} and {len(prompt.wrong)}"
            )
        together[(prompt.clean.shape[1], *(prompt.roles[role] for role in names))].append(at)
    found: dict[str, torch.Tensor] = {}
    for (_, *positions), which in together.items():
        some = [task.encoded[at] for at in which]
        experiment = Patching(
            task.model,
            torch.cat([each.clean for each in some]),
            torch.cat([each.corrupted for each in some]),
            metric=LogitDiff([each.answers[0] for each in some], [each.wrong[0] for each in some]),
            progress=progress,
        )
        grid = experiment.grid(
            site, into=into, values=values, layers=layers, positions=sorted(set(positions))
        )
        columns = [grid.positions.index(position) for position in positions]
        for name, part in (
            ("values", grid.values[:, :, columns]),
            ("clean", grid.clean),
            ("corrupted", grid.corrupted),
        ):
            shape = (len(task.prompts), *part.shape[1:])
            found.setdefault(name, torch.full(shape, torch.nan, dtype=torch.float32))[which] = (
                part.float().cpu()
            )
    return RoleGrid(
        model=describe(task.model),
        task=task.name,
        counterfactual=task.counterfactual,
        prompts=tuple(prompt.clean for prompt in task.prompts),
        site=site,
        source=grid.source,
        into=grid.into,
        layers=grid.layers,
        roles=names,
        **found,
        seed=task.seed,
        note=task.note,
    )


def _roles(task: Task, roles: Sequence[str] | None) -> tuple[str, ...]:
    """The roles to patch; every prompt must have each of them."""
    for role in () if roles is None or isinstance(roles, str) else roles:
        lacking = [at for at, each in enumerate(task.encoded) if role not in each.roles]
        if 0 < len(lacking) < len(task.encoded):
            raise ValueError(f"prompt {lacking[0]} has no role {role!r}: {task.prompts[lacking[0]].clean!r}")
    return task.shared_roles if roles is None else names_of("role", roles, task.shared_roles)
