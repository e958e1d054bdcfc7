"""Whether a model does a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.tasks.answers import TOGETHER
from mechlens.arguments import check_between
from mechlens.measures.statistics import bootstrap_interval
from mechlens.models.protocol import LensModel, describe
from mechlens.models.run.forward import parts, watch
from mechlens.models.run.properties import check_rows_alike
from mechlens.models.run.sites import last_hook
from mechlens.models.run.unembedding import check_streamed, final_norm, unembedding
from mechlens.results import TaskPerformance
from mechlens.text.tokens import token_strings

if TYPE_CHECKING:
    from mechlens.analyses.tasks.task import Task


def measure_performance(task: Task, confidence: float) -> TaskPerformance:
    """`Task.performance`."""
    check_between("confidence", confidence, 0, 1)
    names = ("answer", "wrong", "corrupted_answer", "corrupted_wrong", "rank", "right")
    found = {name: torch.full((len(task.prompts),), torch.nan, dtype=torch.float32) for name in names}
    check_streamed(task.model, task.groups[-1].tokens)
    for group in task.groups:
        for before, tokens in (("", group.tokens), ("corrupted_", group.corrupted)):
            for at, row in zip(group.index, _last_log_probs(task.model, tokens), strict=True):
                ids = task.encoded[at]
                right, wrong = (row[list(some)] for some in (ids.answers, ids.wrong))
                found[f"{before}answer"][at] = right.logsumexp(0)
                found[f"{before}wrong"][at] = wrong.logsumexp(0)
                if not before:
                    found["rank"][at] = 1 + int((row > right.max()).sum())
                    found["right"][at] = float(right.max() > wrong.max())
    return _performance(task, found, confidence)


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
    for some in torch.cat(found).split(TOGETHER):
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
