"""Patch a task's positions by role, such as the second subject, wherever it occurs in a prompt."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.patching import Patching
from mechlens.analyses.patching.metrics import Ids, Metric
from mechlens.arguments import names_of
from mechlens.measures.unembedding import Unembedding
from mechlens.models.protocol import LensModel, describe
from mechlens.results.tasks import RoleGrid

if TYPE_CHECKING:
    from mechlens.analyses.tasks.task import Task

AXES = ("layer", "head", "role")


def patch_roles(
    task: Task,
    site: str,
    *,
    over: Iterable[str] | str,
    into: str | None,
    values: Any,
    layers: Sequence[int] | None,
    roles: Sequence[str] | None,
    progress: bool | None,
) -> RoleGrid:
    """`Task.grid`. Prompts with the same length and role positions run together."""
    axes = names_of("axis", over, AXES, may_be_empty=True)
    by_role = "role" in axes
    names = () if roles is None and not by_role else _roles(task, roles)
    together: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for at, prompt in enumerate(task.encoded):
        together[(prompt.clean.shape[1], *(prompt.roles[role] for role in names))].append(at)
    found: dict[str, Tensor] = {}
    for (_, *positions), which in together.items():
        some = [task.encoded[at] for at in which]
        experiment = Patching(
            task.model,
            torch.cat([each.clean for each in some]),
            torch.cat([each.corrupted for each in some]),
            metric=_AnswerDiff([each.answers for each in some], [each.wrong for each in some]),
            progress=progress,
        )
        grid = experiment.grid(
            site,
            over=["pos" if axis == "role" else axis for axis in axes],
            into=into,
            values=values,
            layers=layers,
            positions=sorted(set(positions)) or None,
        )
        cells = grid.values
        if by_role:
            cells = cells[..., [grid.positions.index(position) for position in positions]]
        for name, part in (("values", cells), ("clean", grid.clean), ("corrupted", grid.corrupted)):
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
        axes=tuple(axis for axis in AXES if axis in axes),
        layers=grid.layers,
        heads=grid.heads,
        roles=names,
        **found,
        seed=task.seed,
        note=task.note,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _AnswerDiff(Metric):
    """The log-sum-exp of the right answers' logits minus that of the wrong ones' at the last position."""

    right: Sequence[tuple[int, ...]]
    """The ids for each prompt."""
    wrong: Sequence[tuple[int, ...]]
    at: Sequence[int] | None = None
    name: ClassVar[str] = "logit_diff"
    unit: ClassVar[str] = "logits"

    def ids(
        self, model: LensModel, tokens: Int[Tensor, "prompt pos"]
    ) -> dict[str, Int[Tensor, "prompt pos"]]:
        """A column for each answer of the prompt that has most; -1 where another has fewer."""
        return {
            f"{side} {at}": torch.tensor([each[at] if at < len(each) else -1 for each in answers])[
                :, None
            ].expand_as(tokens)
            for side, answers in (("right", self.right), ("wrong", self.wrong))
            for at in range(max(map(len, answers)))
        }

    def terms(
        self,
        unembedding: Unembedding,
        vectors: Float[Tensor, "row some d_model"],
        ids: Ids,
        clean: Float[Tensor, "1 some d_model"],
    ) -> Float[Tensor, "row some"]:
        right, wrong = (
            # the rows are runs of one prompt, which have the same answers
            torch.stack([each[0, 0] for name, each in ids.items() if name.startswith(side)])
            for side in ("right", "wrong")
        )
        high, low = (
            unembedding.of_each(vectors[:, 0], some[some >= 0]).logsumexp(1, keepdim=True)
            for some in (right, wrong)
        )
        return high - low


def _roles(task: Task, roles: Sequence[str] | None) -> tuple[str, ...]:
    """The roles to patch; every prompt must have each of them."""
    for role in () if roles is None or isinstance(roles, str) else roles:
        lacking = [at for at, each in enumerate(task.encoded) if role not in each.roles]
        if 0 < len(lacking) < len(task.encoded):
            raise ValueError(f"prompt {lacking[0]} has no role {role!r}: {task.prompts[lacking[0]].clean!r}")
    return task.shared_roles if roles is None else names_of("role", roles, task.shared_roles)
