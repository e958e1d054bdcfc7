"""A task: prompts for a model to answer, and whether it can."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechlens.analyses.tasks.edges import SHARES, estimate_edges, faithfulness_curve, prune_edges
from mechlens.analyses.tasks.groups import grouped
from mechlens.analyses.tasks.kinds import head_kinds
from mechlens.analyses.tasks.patching import patch_roles
from mechlens.analyses.tasks.performance import measure_performance
from mechlens.analyses.tasks.sets import measure_circuit, run_set
from mechlens.arguments import check_model
from mechlens.models.protocol import LensModel
from mechlens.results import CopyScores, HeadScores
from mechlens.results.task_circuits import CircuitCurve, ComponentSet, EdgeEffects, TaskCircuit
from mechlens.results.task_heads import TaskHeads
from mechlens.results.tasks import RoleGrid, TaskPerformance
from mechlens.text.task_prompts import TaskPrompt, encoded, read_prompts


class Task:
    """Prompts that a model answers with the next token, each with a counterfactual and named positions.

    Args:
        model: the model to run; its tokenizer encodes the prompts.
        prompts: clean and corrupted texts, answers, wrong answers and roles.
        name: what results call the task.
        counterfactual: how the corrupted texts differ, in a word or two.
        seed: the seed that the prompts were drawn with, if any.
        prepend_bos: whether to prepend BOS; None prepends it if the tokenizer has one.

    Raises:
        ValueError: no prompts; clean and corrupted prompts of different lengths; an answer of several tokens,
            or one that is both right and wrong.

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
        self.counterfactual, self.seed, self.prepend_bos = counterfactual, seed, prepend_bos
        self.encoded = tuple(encoded(model, each, prepend_bos=prepend_bos) for each in self.prompts)
        self.groups = grouped(self.encoded)

    @functools.cached_property
    def note(self) -> str:
        """What all results say of a task that the model cannot do; empty where it can. See `performance`."""
        return self.performance().note

    @property
    def answer_ids(self) -> Int[Tensor, " token"]:
        """Every right or wrong answer of any prompt, once."""
        return torch.tensor(sorted({id for each in self.encoded for id in (*each.answers, *each.wrong)}))

    @property
    def shared_roles(self) -> tuple[str, ...]:
        """The roles that every prompt has."""
        return tuple(
            role for role in self.encoded[0].roles if all(role in each.roles for each in self.encoded)
        )

    @classmethod
    def from_file(
        cls,
        source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
        model: LensModel,
        *,
        name: str | None = None,
        prepend_bos: bool | None = None,
    ) -> Task:
        """Read your own task from a .csv or .jsonl file, or from a list of rows.

        Args:
            source: has the columns `clean`, `corrupted`, `answer` and `wrong`, and for each role a column
                such as `role_S2` with its word in `clean` (`word#2` is the word's second occurrence). In
                JSON, `answer` and `wrong` may be lists.
            model: the model to run; its tokenizer encodes the prompts.
            name: None takes the file's name.
            prepend_bos: whether to prepend BOS; None prepends it if the tokenizer has one.

        Raises:
            ValueError: another file type, no rows, or a row in which something is missing or wrong; the error
                gives its number.

        Example:
            >>> row = {"clean": "He is", "corrupted": "They is", "answer": " a", "wrong": " the"}
            >>> len(mechlens.Task.from_file([row], model).prompts)
            1
        """
        if name is None:
            name = os.path.basename(source) if isinstance(source, (str, os.PathLike)) else "task"
        return cls(model, read_prompts(source), name=name, prepend_bos=prepend_bos)

    def halves(self) -> tuple[Task, Task]:
        """The prompts with even and with odd numbers, as two tasks: what one finds, the other can test.

        Raises:
            ValueError: there is a single prompt.

        Example:
            >>> first, second = mechlens.load_task("agreement", model, n=7).halves()
            >>> len(first.prompts), len(second.prompts)
            (4, 3)
        """
        if len(self.prompts) < 2:
            raise ValueError("a task of a single prompt has no halves: make more")
        known = {name: getattr(self, name) for name in ("name", "counterfactual", "seed", "prepend_bos")}
        first, second = (Task(self.model, self.prompts[start::2], **known) for start in (0, 1))
        return first, second

    def performance(self, *, confidence: float = 0.95) -> TaskPerformance:
        """Measure how well the model does on the task, compared with chance and with the corrupted prompts.

        Args:
            confidence: coverage of the bootstrap intervals over prompts, between 0 and 1.

        Returns:
            For each prompt the total log-probabilities (nats) of the right and of the wrong answers, on the
            clean and the corrupted text. With one answer of each kind, their difference is the logit
            difference.

        Raises:
            ValueError: `confidence` is out of range, or the model's logits involve more than its final norm,
                `W_U`, `b_U` and a soft-cap.

        Example:
            >>> found = mechlens.load_task("agreement", model, n=8).performance()
            >>> found.chance, found.able  # "The hand near the men is": the last noun misleads a small model
            (0.5, False)

        Cost: two forward passes per prompt.
        """
        return measure_performance(self, confidence)

    def grid(
        self,
        site: str,
        *,
        over: Iterable[str] | str = ("layer", "role"),
        into: str | None = None,
        values: Any = None,
        layers: Sequence[int] | None = None,
        roles: Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> RoleGrid:
        """Patch one layer or head at the position of one role: the change in the logit difference.

        Args:
            site: `resid_pre`, `attn_out`, `mlp_out`, `z` or another site of `Patching.grid`.
            over: the axes of the grid, some of "layer", "head" (for sites by head) and "role". Everything
                else is patched together.
            into: the run to patch: "corrupted" restores it with the clean run's values (denoising), "clean"
                breaks it (noising). None is "corrupted", unless `values` is given.
            values: what to patch in, as in `Patching.grid`; None is the other run's value.
            layers: the layers to patch; None is all.
            roles: the roles to patch, such as ["S2", "END"]; None is all roles that every prompt has, or
                all positions if `over` has no "role".
            progress: show a bar; None shows one in a terminal and in Jupyter.

        Returns:
            `.effect` and `.recovered` by these axes, means over prompts; `plot_role_grid` draws them. Of
            several answers, the logits' log-sum-exp counts.

        Raises:
            ValueError: a role that some prompt lacks, or as `Patching.grid`.

        Example:
            >>> found = mechlens.load_task("agreement", model, n=4).grid("resid_pre", layers=[0])
            >>> found.roles, found.effect.shape
            (('subject', 'distractor', 'END'), torch.Size([1, 3]))

        Cost: that of `Patching.grid` for each set of prompts with the same length and role positions.
        """
        return patch_roles(
            self, site, over=over, into=into, values=values, layers=layers, roles=roles, progress=progress
        )

    def keep(self, components: Any, *, by: str = "resample", metric: str = "logit_diff") -> ComponentSet:
        """Run the task with only some heads, MLPs, layers or edges, and everything else replaced.

        Args:
            components: heads (`L9H6`), MLPs (`L5.mlp`) and layers (`L5`); or edges (`L4H11->L5H5.k`,
                `embed->L0H1.q`, `L9H9->logits`). With heads and MLPs, the embedding is always kept.
            by: what the rest carries: its value on the corrupted prompt (`resample`), its mean over the
                corrupted prompts at the same role and distance from it (`mean`), or `zero`.
            metric: `logit_diff`, nats, or `probability_diff`.

        Returns:
            The metric for each prompt, beside that of the whole model and of nothing; `.faithfulness`.

        Raises:
            ValueError: a component that the model does not have, an edge that runs backwards, edges beside
                heads, or a model whose inputs are not sums of what components write (for edges).

        Example:
            >>> task = mechlens.load_task("agreement", model, n=4)
            >>> found = task.keep(["L0", "L1", "L2", "L3"])
            >>> torch.allclose(found.values, found.full)
            True

        Cost: one forward pass of each corrupted prompt and three of each clean one. What all components write
        on the corrupted prompts is in memory: `4 d_model (2 n_layers + 1)` bytes for each of their tokens.
        """
        return run_set(self, components, by, metric, kept=True)

    def knock_out(self, components: Any, *, by: str = "resample", metric: str = "logit_diff") -> ComponentSet:
        """Run the task without some heads, MLPs, layers or edges; returns and raises the same as `keep`.

        Args:
            components: heads, MLPs and layers, or edges, as for `keep`.
            by: what the set carries: `resample`, `mean` or `zero`.
            metric: `logit_diff`, nats, or `probability_diff`.

        Example:
            >>> found = mechlens.load_task("agreement", model, n=4).knock_out(["L1H0", "L2.mlp"], by="mean")
            >>> found.components
            ('L1H0', 'L2.mlp')

        Cost: one forward pass of each corrupted prompt and three of each clean one.
        """
        return run_set(self, components, by, metric, kept=False)

    def circuit(
        self,
        components: Any,
        *,
        by: str = "resample",
        metric: str = "logit_diff",
        members: bool = True,
        n_random: int = 20,
        seed: int = 0,
        progress: bool | None = None,
    ) -> TaskCircuit:
        """Measure how faithful, complete and minimal a circuit is, beside random sets of its size.

        Args:
            components: heads, MLPs and layers, or edges, as for `keep`.
            by: what the rest carries: `resample`, `mean` or `zero`.
            metric: `logit_diff`, nats, or `probability_diff`.
            members: measure what each member adds; turn it off for many edges.
            n_random: sets of as many components in each layer (or edges into it), drawn at random.
            seed: of the random sets.
            progress: show a bar; None shows one in a terminal and in Jupyter.

        Returns:
            `.faithfulness`, the share of the task that the circuit alone does; `.left`, the share that the
            rest of the model still does; what each member adds; and both shares of the random sets.

        Raises:
            ValueError: as `keep`.

        Example:
            >>> task = mechlens.load_task("agreement", model, n=4)
            >>> found = task.circuit(["L2", "L3"], n_random=2)
            >>> len(found.components), found.random_faithfulness.shape
            (14, torch.Size([2]))

        References: Wang et al. 2022, arXiv:2211.00593; Mueller et al. 2025, arXiv:2504.13151.
        Cost: a forward pass of each prompt for the whole, nothing, the circuit, the rest, each member, and
        two for each random set.
        """
        return measure_circuit(
            self, components, by, metric, members=members, n_random=n_random, seed=seed, progress=progress
        )

    def edges(
        self,
        *,
        by: str = "resample",
        metric: str = "logit_diff",
        steps: int = 1,
        exact: int | None = 0,
        seed: int = 0,
        progress: bool | None = None,
    ) -> EdgeEffects:
        """Estimate what replacing each edge alone does to the metric, by edge attribution patching.

        Args:
            by: what a replaced edge carries: `resample`, `mean` or `zero`.
            metric: `logit_diff`, nats, or `probability_diff`.
            steps: 1 takes gradients in the clean run. More average them over as many inputs between the clean
                and the replaced embeddings (integrated gradients), at midpoints.
            exact: edges of which the exact effect is measured as well, each in a run of its own: half of them
                those with the largest estimates, half drawn from the others. None is all edges.
            seed: of the draw.
            progress: show a bar; None shows one in a terminal and in Jupyter.

        Returns:
            `.effect` `[sender, receiver]`, the metric with the edge replaced less that of the clean run:
            negative where the edge helps. `.top(k)` names the most important edges, `.nodes` sums over the
            edges that leave a component, `.correlation` compares with the exact effects.

        Raises:
            ValueError: a model whose inputs are not sums of what components write.

        Example:
            >>> found = mechlens.load_task("agreement", model, n=4).edges(exact=10)
            >>> found.n_edges, len(found.exact)
            (903, 10)

        References: Syed et al. 2023, arXiv:2310.10348; Hanna et al. 2024, arXiv:2403.17806.
        Cost: two forward passes and `steps` forward and backward passes of each prompt, and one for each
        exact edge.
        """
        return estimate_edges(self, by, metric, steps=steps, exact=exact, seed=seed, progress=progress)

    def curve(
        self,
        effects: EdgeEffects,
        *,
        shares: Sequence[float] = SHARES,
        of_edges: bool = True,
        absolute: bool = False,
        n_random: int = 3,
        seed: int = 0,
        progress: bool | None = None,
    ) -> CircuitCurve:
        """Measure the faithfulness of the most important edges or components, for several sizes.

        Args:
            effects: what ranks them: the result of `edges`, of this task or of other prompts.
            shares: of all edges or components, between 0 and 1; at least one is kept.
            of_edges: keep edges. False keeps heads and MLPs, ranked by the sum over their edges.
            absolute: rank by the size of the effect; False puts what hurts last.
            n_random: random rankings, as a null.
            seed: of the random rankings.
            progress: show a bar; None shows one in a terminal and in Jupyter.

        Returns:
            `.faithfulness` by size, its areas `.cpr` and `.cmd`, and the same for random rankings and, if
            `effects` has the exact effect of every edge, for the ranking by these.

        Raises:
            ValueError: effects of another model, or a share out of range.

        Example:
            >>> task = mechlens.load_task("agreement", model, n=4)
            >>> found = task.curve(task.edges(), shares=(0.1, 1), n_random=1)
            >>> found.sizes, round(float(found.faithfulness[-1]), 3)
            ((90, 903), 1.0)

        References: Mueller et al. 2025, "MIB: A Mechanistic Interpretability Benchmark", arXiv:2504.13151.
        Cost: a forward pass of each prompt for every size and ranking.
        """
        return faithfulness_curve(
            self,
            effects,
            shares=shares,
            of_edges=of_edges,
            absolute=absolute,
            n_random=n_random,
            seed=seed,
            progress=progress,
        )

    def heads(
        self,
        effects: EdgeEffects,
        *,
        copying: CopyScores | None = None,
        scores: HeadScores | None = None,
        top: int = 20,
    ) -> TaskHeads:
        """List the most important heads, what their last position attends to, and what kind they are.

        Args:
            effects: the result of `edges`, which ranks the heads by size of effect.
            copying: `copy_scores` of the task's `answer_ids`: which heads copy or suppress an answer.
            scores: `score_heads` on repeated random tokens: which are induction heads and the like.
            top: how many heads.

        Returns:
            Effects, attention from the last position to each role, and the scores with their nulls; `.kinds`
            names what a head clearly is.

        Example:
            >>> task = mechlens.load_task("agreement", model, n=4)
            >>> copying = mechlens.copy_scores(model, task.answer_ids)
            >>> task.heads(task.edges(), copying=copying, top=3).roles
            ('subject', 'distractor', 'END')

        Cost: one forward pass of each prompt.
        """
        return head_kinds(self, effects, copying, scores, top=top)

    def prune(
        self,
        threshold: float,
        *,
        edges: Any = None,
        by: str = "resample",
        metric: str = "logit_diff",
        progress: bool | None = None,
    ) -> tuple[str, ...]:
        """Remove edges one by one, from the logits down to the embedding, if the metric barely changes.

        Args:
            threshold: an edge is removed for good if the mean metric of the run with everything that was
                removed so far then changes by less than this, either way. In the metric's unit, above 0.
            edges: the edges to begin with, such as `Task.edges().top(500)`; None is all of the model's.
            by: what a removed edge carries: `resample`, `mean` or `zero`.
            metric: `logit_diff`, nats, or `probability_diff`.
            progress: show a bar; None shows one in a terminal and in Jupyter.

        Returns:
            The edges that are left. Edges into a component that no kept edge leaves are removed, too.

        Raises:
            ValueError: as `keep`, or `threshold` is not above 0.

        Example:
            >>> task = mechlens.load_task("agreement", model, n=2)
            >>> left = task.prune(0.05, edges=task.edges().top(20, absolute=True))
            >>> len(left) < 20
            True

        References: Conmy et al. 2023, "Towards Automated Circuit Discovery for Mechanistic Interpretability",
        arXiv:2304.14997, whose rule this is with another metric than KL.
        Cost: one forward pass of each prompt per edge.
        """
        return prune_edges(self, threshold, edges=edges, by=by, metric=metric, progress=progress)
