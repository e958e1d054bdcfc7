"""A task: prompts that a model answers, and whether it can."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.tasks.patching import patch_roles
from mechlens.arguments import check_between, check_counts, check_model, generator_of
from mechlens.measures.statistics import bootstrap_interval
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.forward import parts, watch
from mechlens.models.run.properties import check_rows_alike
from mechlens.models.run.sites import last_hook
from mechlens.models.run.unembedding import check_streamed, final_norm, unembedding
from mechlens.results.tasks import RoleGrid, TaskPerformance
from mechlens.text.task_library import made
from mechlens.text.task_prompts import EncodedPrompt, TaskPrompt, encoded, read_prompts
from mechlens.text.tokens import token_strings

_TOGETHER = 32
"""Prompts whose logits are in memory at once."""


@dataclasses.dataclass(frozen=True, eq=False)
class TaskGroup:
    """Prompts of one length, which can run together."""

    index: tuple[int, ...]
    """Their numbers in the task."""
    tokens: Int[Tensor, "prompt pos"]
    corrupted: Int[Tensor, "prompt pos"]


class Task:
    """Prompts that a model answers with the next token, each with a counterfactual and roles of positions.

    Args:
        model: the model whose tokenizer the prompts are made for.
        prompts: clean and corrupted texts, answers, wrong answers and roles.
        name: what results call the task.
        counterfactual: how the corrupted texts differ, in a word or two.
        seed: that the prompts were drawn with, where they were.
        prepend_bos: None prepends BOS where the tokenizer has one.

    Raises:
        ValueError: no prompts; clean and corrupted of different lengths; an answer of two tokens, or one
            that is right and wrong.

    Example:
        >>> row = {"clean": "He is", "corrupted": "They is", "answer": " a", "wrong": " the", "role_S": "He"}
        >>> task = mechlens.Task.from_file([row], model)
        >>> task.encoded[0].roles
        {'S': 1, 'END': 2}
    """

    def __init__(
        self,
        model: LensModel,
        prompts: Sequence[TaskPrompt],
        *,
        name: str = "task",
        counterfactual: str = "",
        seed: int | None = None,
        prepend_bos: bool | None = None,
    ) -> None:
        check_model(model)
        if not prompts:
            raise ValueError("a task needs at least one prompt")
        self.model, self.prompts, self.name = model, tuple(prompts), name
        self.counterfactual, self.seed = counterfactual, seed
        self.encoded = tuple(encoded(model, each, prepend_bos=prepend_bos) for each in self.prompts)
        self.groups = _grouped(self.encoded)

    @classmethod
    def from_file(
        cls,
        source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
        model: LensModel,
        *,
        name: str | None = None,
        prepend_bos: bool | None = None,
    ) -> Task:
        """Read a task of your own from a .csv or .jsonl file, or from rows with the same names.

        Args:
            source: with the columns `clean`, `corrupted`, `answer`, `wrong`, and for each role a column such
                as `role_S2` with its word in `clean` (`word#2` is its second occurrence). In JSON, `answer`
                and `wrong` may be lists.
            model: the model whose tokenizer the prompts are made for.
            name: None takes that of the file.
            prepend_bos: None prepends BOS where the tokenizer has one.

        Raises:
            ValueError: another ending, no rows, or a row with something missing or wrong; with its number.

        Example:
            >>> row = {"clean": "He is", "corrupted": "They is", "answer": " a", "wrong": " the"}
            >>> len(mechlens.Task.from_file([row], model).prompts)
            1
        """
        if name is None:
            name = os.path.basename(source) if isinstance(source, (str, os.PathLike)) else "task"
        return cls(model, read_prompts(source), name=name, prepend_bos=prepend_bos)

    def performance(self, *, confidence: float = 0.95) -> TaskPerformance:
        """Measure how well the model does the task, against chance and on the corrupted prompts.

        Args:
            confidence: coverage of the bootstrap intervals over prompts, between 0 and 1.

        Returns:
            For each prompt the log-probabilities (nats) of the right and the wrong answers, together, on the
            clean and the corrupted text; their difference is the logit difference where there is one of each.

        Raises:
            ValueError: `confidence` is out of range, or the model's logits are more than its last norm
                through `W_U`.

        Example:
            >>> found = mechlens.load_task("agreement", model, n=8).performance()
            >>> found.chance, found.able  # "The hand near the men is": the last noun misleads a small model
            (0.5, False)

        Cost: two forward passes of each prompt.
        """
        check_between("confidence", confidence, 0, 1)
        names = ("answer", "wrong", "corrupted_answer", "corrupted_wrong", "rank", "right")
        found = {name: torch.full((len(self.prompts),), torch.nan, dtype=torch.float32) for name in names}
        check_streamed(self.model, self.groups[-1].tokens)
        for group in self.groups:
            for before, tokens in (("", group.tokens), ("corrupted_", group.corrupted)):
                for at, row in zip(group.index, _last_log_probs(self.model, tokens), strict=True):
                    ids = self.encoded[at]
                    right, wrong = (row[list(some)] for some in (ids.answers, ids.wrong))
                    found[f"{before}answer"][at] = right.logsumexp(0)
                    found[f"{before}wrong"][at] = wrong.logsumexp(0)
                    if not before:
                        found["rank"][at] = 1 + int((row > right.max()).sum())
                        found["right"][at] = float(right.max() > wrong.max())
        return _performance(self, found, confidence)

    def grid(
        self,
        site: str,
        *,
        into: str | None = None,
        values: Any = None,
        layers: Sequence[int] | None = None,
        roles: Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> RoleGrid:
        """Patch one layer at the position of one role, and measure the change in the logit difference.

        Args:
            site: `resid_pre`, `attn_out`, `mlp_out`, `z` (all heads) or another site of `Patching.grid`.
            into: "corrupted" restores that run with the clean run's values (denoising), "clean" breaks it
                (noising). None is "corrupted", unless `values` is given.
            values: what is put there; None is the value of the other run. As in `Patching.grid`.
            layers: the layers that are patched; None is all.
            roles: the roles that are patched, such as ["S2", "END"]; None is all that every prompt has.
            progress: show a bar; None shows one in a terminal and in Jupyter.

        Returns:
            `.effect` and `.recovered` `[layer, role]`, means over prompts; `plot_role_grid` draws it.

        Raises:
            ValueError: a role that a prompt lacks, or a prompt with several right or wrong answers.

        Example:
            >>> found = mechlens.load_task("agreement", model, n=4).grid("resid_pre", layers=[0])
            >>> found.roles, found.effect.shape
            (('subject', 'distractor', 'END'), torch.Size([1, 3]))

        Cost: that of `Patching.grid` for each set of prompts with the same length and positions.
        """
        return patch_roles(
            self, site, into=into, values=values, layers=layers, roles=roles, progress=progress
        )


def load_task(
    name: str,
    model: LensModel,
    *,
    n: int = 64,
    seed: int = 0,
    counterfactual: str | None = None,
    prepend_bos: bool | None = None,
) -> Task:
    """Make the prompts of a built-in task for a model's tokenizer.

    Names, years and words that must be one token are checked to be one; the others are left out.

    Args:
        name: `ioi` (the indirect object), `greater-than` (a later year), `agreement` (subject and verb across
            another noun), `capitals`, `gender` (the pronoun of a name) or `docstring` (the next argument).
        model: the model whose tokenizer the prompts are made for.
        n: number of prompts.
        seed: of the draw.
        counterfactual: how the corrupted prompts differ; None is the usual way. For `ioi`, `swap-subject`
            (which swaps the answer) or `other-names`.
        prepend_bos: None prepends BOS where the tokenizer has one.

    Raises:
        ArgumentError: another name or counterfactual, or `n` is below 1.
        ValueError: too few words are one token of this model, or it reads years in another way.

    Example:
        >>> task = mechlens.load_task("agreement", model, n=4)
        >>> task.prompts[1].answers
        (' are',)

    References: Wang et al. 2022, arXiv:2211.00593; Hanna et al. 2023, arXiv:2305.00586; Linzen et al. 2016,
    arXiv:1611.01368.
    """
    check_model(model)
    check_counts(n=n)
    prompts, chosen = made(model, name, n, generator_of(seed), counterfactual)
    return Task(model, prompts, name=name, counterfactual=chosen, seed=seed, prepend_bos=prepend_bos)


def _grouped(prompts: Sequence[EncodedPrompt]) -> tuple[TaskGroup, ...]:
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


def _last_log_probs(
    model: LensModel, tokens: Int[Tensor, "prompt pos"]
) -> Iterator[Float[Tensor, " d_vocab"]]:
    """Log-probabilities after the last token of each prompt, on the CPU, a few prompts at a time."""
    several = parts(tokens)
    if len(several) > 1:
        check_rows_alike(model, tokens)
    found: list[Tensor] = []
    for rows in several:
        watch(model, rows, {last_hook(model): lambda stream: found.append(stream[:, -1])})
    for some in torch.cat(found).split(_TOGETHER):
        with torch.inference_mode():
            logits = unembedding(model).logits(final_norm(model, some))
            rows = logits.log_softmax(-1).cpu()
        yield from rows


def _performance(task: Task, found: dict[str, Tensor], confidence: float) -> TaskPerformance:
    difference = found["answer"] - found["wrong"]
    samples = {
        "accuracy": found["right"],
        "top1": (found["rank"] == 1).float(),
        "logit_diff": difference,
        "probability_diff": found["answer"].exp() - found["wrong"].exp(),
        "corrupted_logit_diff": found["corrupted_answer"] - found["corrupted_wrong"],
    }
    estimates = {}
    for name, values in samples.items():
        low, high = bootstrap_interval(values, confidence=confidence)
        estimates[name] = (float(values.mean()), float(low), float(high))
    shares = [len(each.answers) / (len(each.answers) + len(each.wrong)) for each in task.encoded]
    return TaskPerformance(
        model=describe(task.model),
        task=task.name,
        counterfactual=task.counterfactual,
        clean=tuple(prompt.clean for prompt in task.prompts),
        corrupted=tuple(prompt.corrupted for prompt in task.prompts),
        answers=tuple(_texts(task, each.answers) for each in task.encoded),
        wrong=tuple(_texts(task, each.wrong) for each in task.encoded),
        answer_log_prob=found["answer"],
        wrong_log_prob=found["wrong"],
        corrupted_answer_log_prob=found["corrupted_answer"],
        corrupted_wrong_log_prob=found["corrupted_wrong"],
        rank=found["rank"],
        right=found["right"].bool(),
        estimates=estimates,
        chance=sum(shares) / len(shares),
        confidence=confidence,
        seed=task.seed,
    )


def _texts(task: Task, ids: Sequence[int]) -> str:
    return ", ".join(token_strings(task.model, torch.tensor(ids)))
