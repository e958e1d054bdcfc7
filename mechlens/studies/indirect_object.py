"""The study `indirect-object`: how well a model identifies the indirect object, and which heads do it.

References: Wang et al. 2022, arXiv:2211.00593.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import product

import torch

from mechlens.analyses.logit_lens import logit_lens
from mechlens.analyses.patching import LogitDiff, Patching
from mechlens.arguments import check_counts, check_model, generator_of
from mechlens.models.protocol import LensModel, describe
from mechlens.results import IndirectObject, PatchGridResult, head_label
from mechlens.show.section import Section, section
from mechlens.studies.claims import Measured, Study
from mechlens.text.prompts import check_equally_long, text_tokens
from mechlens.text.task_library import IOI_TEMPLATES, MEN, WOMEN
from mechlens.text.task_prompts import one_token
from mechlens.text.tokens import target_id

NAMES = tuple(sorted((*WOMEN, *MEN)))
"""24 first names, each with its leading space."""
N_PATCHED = 20
"""Prompts that are patched. With fewer, the spread of their mean is unknown."""


def indirect_object(
    model: LensModel,
    *,
    n_prompts: int = 60,
    templates: Sequence[str] = IOI_TEMPLATES,
    names: Sequence[str] = NAMES,
    seed: int = 0,
    prepend_bos: bool | None = None,
) -> IndirectObject:
    """Ask a model for the indirect object: "When Mary and John went to the store, John gave a drink to".

    Args:
        n_prompts: number of prompts. Templates alternate, and so does the order of subject and object.
        templates: texts with `{a}` and `{b}` for the two names and `{s}` for the repeated name. All must
            have the same number of tokens.
        names: first names with their leading space. Names that are not one token of this model are left out.
        seed: of the draw of names.
        prepend_bos: None prepends BOS where the tokenizer has one.

    Returns:
        The prompts, the corrupted prompts with the other name as the subject, and for each prompt the logit
        of the indirect object minus that of the subject; as the null baseline, the same difference for two
        names that do not occur in it.

    Raises:
        ValueError: fewer than four names of one token, prompts of different lengths, `n_prompts` below 1.

    Example:
        >>> people, templates = (" he", " she", " they", " it"), ("When{a} and{b} came,{s} said to",)
        >>> found = mechlens.indirect_object(model, n_prompts=6, templates=templates, names=people)
        >>> found.logit_diff.shape
        torch.Size([6])

    References: Wang et al. 2022, arXiv:2211.00593.
    Cost: two forward passes.
    """
    check_model(model)
    check_counts(n_prompts=n_prompts)
    usable = one_token(model, names, 4, "names")
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
    )
    # Both log-probabilities have the same normalizer, so this is the difference of the logits.
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


@dataclasses.dataclass(frozen=True)
class IndirectObjectStudy(Study):
    """The task, and activations of the clean run patched into the corrupted run."""

    indirect_object: IndirectObject
    indirect_object_heads: PatchGridResult
    """By layer and head: `z` at all positions."""
    indirect_object_positions: PatchGridResult
    """By layer and position: `resid_pre`."""

    def quantities(self) -> dict[str, Measured]:
        task = self.indirect_object
        right, first = (task.logit_diff > 0).float(), (task.rank == 1).float()
        shares = share_recovered(self.indirect_object_heads)
        mean = shares.mean(0)
        measured = {
            "logit_diff": Measured(
                float(task.logit_diff.mean()),
                "logit of the indirect object minus that of the subject, mean over prompts",
                samples=task.logit_diff,
            ),
            "null": Measured(
                float(task.null.mean()),
                "the same difference for two names that do not occur in the prompt",
                samples=task.null,
            ),
            # If all prompts are right, resampling them shows no spread: three in sixty may differ.
            "right": Measured(
                float(right.mean()),
                "share of prompts in which the indirect object is more likely than the subject",
                0.05,
                among=right,
            ),
            "first": Measured(
                float(first.mean()),
                "share of prompts in which the indirect object is the top-1 prediction",
                samples=first,
            ),
            "strongest head": Measured(
                head_label(*divmod(int(mean.argmax()), mean.shape[1])),
                "head that recovers the largest share of the logit difference",
            ),
        }
        for layer, head in product(*map(range, mean.shape)):
            label, own = head_label(layer, head), shares[:, layer, head]
            text = f"share of the logit difference that {label} alone recovers"
            measured[label] = Measured(float(mean[layer, head]), text, samples=own)
        by_place = share_recovered(self.indirect_object_positions)
        at_subject = by_place[:, :, int(task.roles["S2"][0])].mean(0)
        at_end = by_place[:, :, -1].mean(0)
        return measured | {
            "leaves S2": Measured(
                int((at_subject < 2 / 3).int().argmax()),
                "first layer before which the second subject's position recovers less than two thirds",
                1,
            ),
            "arrives at END": Measured(
                int((at_end > 2 / 3).int().argmax()),
                "first layer before which the last position recovers more than two thirds",
                1,
            ),
        }

    def sections(self) -> list[Section]:
        return [
            section(self.indirect_object),
            section(
                self.indirect_object_heads,
                title="Heads that move the indirect object",
                text="Each head's output in the clean run is patched into the run whose subject is the other "
                "name.",
            ),
            section(
                self.indirect_object_positions,
                title="Layers and positions that carry the indirect object",
                text="The residual stream of the clean run is patched in at one position before one layer.",
            ),
        ]


def study_indirect_object(
    model: LensModel, *, n_patched: int = N_PATCHED, seed: int = 0, progress: bool | None = None
) -> IndirectObjectStudy:
    """Do the task, then patch each head, and each layer and position.

    Args:
        n_patched: number of prompts in which to patch each head. Each layer and position is patched in those
            of the first template, whose roles have the same positions.
        seed: of the prompts.

    Cost: for each patched prompt one resumed run per head.
    """
    task = indirect_object(model, seed=seed)

    def experiment(which: list[int]) -> Patching:
        metric = LogitDiff([task.objects[at] for at in which], [task.subjects[at] for at in which])
        return Patching(model, task.tokens[which], task.corrupted[which], metric=metric, progress=progress)

    first = list(range(min(n_patched, len(task.tokens))))
    alike = [at for at in first if int(task.template[at]) == 0]
    heads, positions = (
        experiment(first).grid("z", over=("layer", "head")),
        experiment(alike).grid("resid_pre"),
    )
    return IndirectObjectStudy((), task, heads, positions)


def share_recovered(grid: PatchGridResult) -> torch.Tensor:
    """Each prompt's change as a share of the mean difference between the clean and the corrupted run:
    `[prompt, *grid]`."""
    start = grid.corrupted.reshape(-1, *[1] * (grid.values.ndim - 1))
    return (grid.values - start) / (grid.clean - grid.corrupted).mean()
