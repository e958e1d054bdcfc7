"""The indirect object: who is given a drink, and which heads know it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from mechlens.analyses.logit_lens import logit_lens
from mechlens.analyses.patching import Corrupted, patch_grid
from mechlens.arguments import check_counts, check_model, generator_of
from mechlens.models.protocol import LensModel, describe
from mechlens.results import IndirectObject, PatchGridResult, Result, head_label
from mechlens.studies.study import Measured, Study
from mechlens.text.prompts import check_equally_long, text_tokens
from mechlens.text.tokens import target_id

TEMPLATES = (
    "When{a} and{b} went to the store,{s} gave a drink to",
    "After{a} and{b} went to the park,{s} gave a book to",
    "Then{a} and{b} had a long argument, and afterwards{s} said to",
)
NAMES = tuple(
    f" {name}"
    for name in [
        "Adam",
        "Alice",
        "Amy",
        "Anna",
        "Daniel",
        "David",
        "Emma",
        "George",
        "Henry",
        "Jack",
        "James",
        "John",
        "Kate",
        "Laura",
        "Lucy",
        "Mark",
        "Martin",
        "Mary",
        "Michael",
        "Peter",
        "Rachel",
        "Robert",
        "Sarah",
        "Simon",
    ]
)
"""24 first names, each with the blank before it."""


def indirect_object(
    model: LensModel,
    *,
    n_prompts: int = 60,
    templates: Sequence[str] = TEMPLATES,
    names: Sequence[str] = NAMES,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> IndirectObject:
    """Ask a model for the indirect object: "When Mary and John went to the store, John gave a drink to".

    Args:
        n_prompts: how many prompts; templates take turns, and so does whether the subject comes first.
        templates: texts with `{a}` and `{b}`, the two names, and `{s}`, the one of them that comes again. All
            must have the same number of tokens.
        names: with the blank before them; those that are not one token of this model are left out.
        seed: of the draw of names.
        prepend_bos: None prepends BOS where the tokenizer has one.

    Returns:
        The prompts, their counterparts with the other name as the subject, and for each prompt the logit of
        the indirect object less the subject's, beside the same difference of names that do not occur in it.

    Raises:
        ValueError: fewer than four names of one token, prompts of different lengths, `n_prompts` below 1.

    Source: Wang et al. 2022, arXiv:2211.00593.
    Cost: two forward passes.

    Example:
        >>> found = mechlens.indirect_object(model)
        >>> (found.logit_diff > 0).float().mean()  # how often it is right; 0.5 by chance
    """
    check_model(model)
    check_counts(n_prompts=n_prompts)
    usable = [name for name in names if _is_one_token(model, name)]
    if len(usable) < 4:
        raise ValueError(
            f"of the {len(names)} names only {len(usable)} are one token of this model, and 4 are needed: "
            "give others with names="
        )
    generator = generator_of(seed)
    clean, corrupted, subjects, objects, which, firsts, seconds = [], [], [], [], [], [], []
    for at in range(n_prompts):
        a, b, c, d = (usable[i] for i in torch.randperm(len(usable), generator=generator)[:4].tolist())
        subject, other = (b, a) if (at // len(templates)) % 2 else (a, b)
        which.append(at % len(templates))
        template = templates[which[-1]]
        clean.append(text_tokens(model, template.format(a=a, b=b, s=subject), prepend_bos=prepend_bos))
        corrupted.append(text_tokens(model, template.format(a=a, b=b, s=other), prepend_bos=prepend_bos))
        subjects.append(subject)
        objects.append(other)
        firsts.append(c)
        seconds.append(d)
    check_equally_long(model, clean)
    tokens = torch.cat(clean).cpu()
    ids = {
        name: torch.tensor([target_id(model, text) for text in texts])
        for name, texts in (("IO", objects), ("S", subjects), ("one", firsts), ("other", seconds))
    }
    last = tokens.shape[1] - 1
    lens = logit_lens(
        model,
        tokens,
        layers=[model.cfg.n_layers - 1],
        positions=[last],
        targets={name: some[:, None].expand_as(tokens) for name, some in ids.items()},
        statistics=["rank", "log_prob"],
        top_k=1,
        progress=False,
    )
    # the normalisation is the same for both, so this is the difference of the logits
    log_prob = {name: lens.log_prob[name][-1, :, 0] for name in ids}
    is_subject = tokens == ids["S"][:, None]
    return IndirectObject(
        model=describe(model),
        templates=tuple(templates),
        template=torch.tensor(which),
        tokens=tokens,
        corrupted=torch.cat(corrupted).cpu(),
        subjects=tuple(subjects),
        objects=tuple(objects),
        roles={
            "IO": (tokens == ids["IO"][:, None]).int().argmax(1),
            "S1": is_subject.int().argmax(1),
            "S2": last - is_subject.flip(1).int().argmax(1),
            "END": torch.full((n_prompts,), last, dtype=torch.long),
        },
        logit_diff=log_prob["IO"] - log_prob["S"],
        null=log_prob["one"] - log_prob["other"],
        rank=lens.rank["IO"][-1, :, 0],
        seed=seed,
    )


def _is_one_token(model: LensModel, name: str) -> bool:
    try:
        target_id(model, name)
    except ValueError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class IndirectObjectStudy(Study):
    """How well a model does the task, and what carries the answer: patched runs towards the clean prompt."""

    task: IndirectObject
    heads: PatchGridResult
    """Each head's `z` of the clean run, put into the run on the corrupted prompt."""
    positions: PatchGridResult
    """The residual stream of the clean run, put there by layer and position."""

    @property
    def results(self) -> Mapping[str, Result]:
        return {
            "indirect_object": self.task,
            "indirect_object_heads": self.heads,
            "indirect_object_positions": self.positions,
        }


def study_indirect_object(
    model: LensModel, *, n_patched: int, seed: int = 0, progress: bool | None = None
) -> IndirectObjectStudy:
    """Do the task, and patch each head, and each layer and position.

    Args:
        n_patched: prompts that are patched head by head; those of the first template also by place.
        seed: of the prompts.

    Cost: for each patched prompt a resumed run for each head.
    """
    task = indirect_object(model, seed=seed)

    def patched(which: list[int], site: str, each_head: bool) -> PatchGridResult:
        return patch_grid(
            model,
            task.tokens[which],
            site=site,
            source=Corrupted(task.corrupted[which]),
            direction="denoising",
            heads="each" if each_head else None,
            positions=None if each_head else "each",
            metric="logit_diff",
            targets=[task.objects[at] for at in which],
            against=[task.subjects[at] for at in which],
            progress=progress,
        )

    first = list(range(min(n_patched, len(task.tokens))))
    # of one template, in which every role has its place
    alike = [at for at in first if int(task.template[at]) == 0]
    return IndirectObjectStudy((), task, patched(first, "z", True), patched(alike, "resid_pre", False))


def of_indirect_object(
    study: IndirectObjectStudy, heads: Sequence[tuple[int, int]] = ()
) -> dict[str, Measured]:
    """What is to be claimed of it, in numbers.

    Args:
        heads: to report beside the one that recovers most.
    """
    task = study.task
    # three prompts in sixty, where all are right and resampling them says nothing
    right = (task.logit_diff > 0).float()
    measured = {
        "logit_diff": Measured(
            "logit of the indirect object less the subject's, mean over prompts",
            float(task.logit_diff.mean()),
            samples=task.logit_diff,
        ),
        "null": Measured(
            "the same of two names that do not occur in the prompt",
            float(task.null.mean()),
            samples=task.null,
        ),
        "right": Measured(
            "share of prompts with the indirect object above the subject",
            float(right.mean()),
            0.05,
            among=right,
        ),
        "first": Measured(
            "share of prompts with the indirect object as the first guess",
            float((task.rank == 1).float().mean()),
            samples=(task.rank == 1).float(),
        ),
    }
    shares = share_recovered(study.heads)
    mean = shares.mean(0)
    best = divmod(int(mean.argmax()), mean.shape[1])
    measured["strongest head"] = Measured("head that recovers most of the difference", head_label(*best))
    for layer, head in dict.fromkeys([best, *heads]):
        label = head_label(layer, head)
        measured[label] = Measured(
            f"share of the difference that {label} alone recovers",
            float(mean[layer, head]),
            samples=shares[:, layer, head],
        )
    by_place = share_recovered(study.positions)
    at_subject = by_place[:, :, int(task.roles["S2"][0])].mean(0)
    at_end = by_place[:, :, -1].mean(0)
    measured["leaves S2"] = Measured(
        "first layer before which the second subject's position carries less than two thirds",
        int((at_subject < 2 / 3).int().argmax()),
        1,
    )
    measured["arrives at END"] = Measured(
        "first layer before which the last position carries more than two thirds",
        int((at_end > 2 / 3).int().argmax()),
        1,
    )
    return measured


def share_recovered(grid: PatchGridResult) -> torch.Tensor:
    """`[prompt, *grid]`: each prompt's change in terms of the mean difference of clean and corrupted runs."""
    start = grid.corrupted.reshape(-1, *[1] * (grid.values.ndim - 1))
    return (grid.values - start) / (grid.clean - grid.corrupted).mean()
