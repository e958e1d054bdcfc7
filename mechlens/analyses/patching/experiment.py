"""Patching as one object: the clean and the corrupted run, the metric, and all kinds of patches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

from jaxtyping import Float
from torch import Tensor

from mechlens.analyses.patching.attribution import estimate_grid
from mechlens.analyses.patching.blocks import block_source
from mechlens.analyses.patching.grid import run_grid
from mechlens.analyses.patching.path import attention_on_path, run_path
from mechlens.analyses.patching.sources import Source
from mechlens.analyses.patching.spec import Experiment, GridSpec
from mechlens.models.protocol import LensModel
from mechlens.results import AttributionPatchResult, PatchGridResult
from mechlens.results.heads import Head, Heads

PutThere = Source | str | Callable[[Tensor, int], Tensor] | None


class Patching(Experiment):
    """A patching experiment: clean prompts, their corrupted counterparts and a metric.

    Its methods `grid`, `path`, `path_attention`, `blocks` and `attribution` each answer one question.

    Args:
        clean: a text or token ids, one sequence or several of the same length; ids are used as they are.
        corrupted: one sequence of the same length, or one for each sequence of `clean`.
        metric: `Loss()` (the default), `LogProb(target)`, `LogitDiff(target, against)`, `KL()`, or a function
            of logits `[read, d_vocab]` that returns one number. Next tokens are those of `clean`, in both
            runs.
        prepend_bos: whether to prepend BOS to texts; None prepends it if the tokenizer has one.
        token_budget: positions that run together, including those that they attend to; None is 8192. It is
            halved when memory runs out.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Raises:
        TypeError: a metric that is none of these.
        ValueError: prompts of different lengths, or a metric that does not fit the prompts.

    Example:
        >>> text = "The old woman went to the {}. The old woman went to the"
        >>> metric = mechlens.LogitDiff(" sea", " town")
        >>> experiment = mechlens.Patching(model, text.format("sea"), text.format("town"), metric=metric)
        >>> experiment.grid("z", over=("layer", "head")).effect.shape
        torch.Size([4, 6])

    References: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", arXiv:2202.05262.
    Cost: nothing until a method is called. Each method runs each prompt and its counterpart once, plus what
    it patches.
    """

    def grid(
        self,
        site: str,
        *,
        over: Iterable[str] | str = ("layer", "pos"),
        into: str | None = None,
        values: PutThere = None,
        weight: float = 1.0,
        layers: Sequence[int] | None = None,
        heads: Heads | None = None,
        positions: Sequence[int] | None = None,
        resume: str | os.PathLike[str] | None = None,
    ) -> PatchGridResult:
        """Patch one activation per forward pass and measure the change in the metric.

        Args:
            site: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, or by head `q`, `k`, `v` (the
                key/value heads, where there are fewer), `z`, `pattern` or `attn_scores` (by position `dest`).
            over: the axes of the grid, some of "layer", "head" and "pos". Everything else is patched
                together.
            into: the run to patch. "corrupted" restores it with the clean run's values (denoising), "clean"
                breaks it (noising). None is "corrupted" if there is a corrupted run and `values` is not
                given.
            values: what to patch in. None is the other run's value. Otherwise "zero"; `Earlier(shift)`;
                `Mean(tokens)`; `Resampled(tokens)`; `NextEmbedding()` (residual streams only); `Edges(pairs)`
                (`pattern` and `attn_scores`); or a function `(activation, layer)` that returns a tensor of
                the same shape. It gets the patched run's activation `[pos, ...]` (scores and patterns
                `[dest, head, src]`) and is called once per prompt and layer.
            weight: how much of the values to mix in; 1 replaces the activation.
            layers: the layers to patch; None is all.
            heads: the heads to patch, such as ["L3H5", "1.2"] or [(3, 5)], instead of `layers`; None is all.
                In a grid by layer and head, the other cells are not run and are nan.
            positions: the positions to patch; None is all that have values: `Earlier` has none at the first
                `shift`, `NextEmbedding` none at the last.
            resume: a `.safetensors` file to save finished cells to, every half minute and when interrupted.
                If the file exists, the grid resumes from it. Functions are identified only by their names.

        Returns:
            For each cell `.effect`, the change in the metric, `.mean`, the metric itself, and `.recovered`,
            the share of the way to the other run; `plot_patch_grid` draws them.

        Raises:
            ValueError: a site, layer, head or position that this model does not have, values that do not fit
                the site, or a file that was started with other arguments; raised before anything is patched.

        Example:
            >>> found = mechlens.Patching(model, "said Mr. Pickwick").grid("mlp_out", values="zero")
            >>> found.axes
            ('layer', 'pos')

        References: Meng et al. 2022, arXiv:2202.05262; Heimersheim and Nanda 2024, "How to use and interpret
        activation patching", arXiv:2404.15255.
        Cost: one forward pass for each prompt, clean and corrupted, and what the values need. On a
        HookedTransformer, each cell costs only the layers and positions from its patch on; on a
        TransformerBridge, these positions through all layers.
        """
        spec = GridSpec.of(
            self,
            site,
            over=over,
            into=into,
            values=values,
            weight=weight,
            layers=layers,
            heads=heads,
            positions=positions,
        )
        return run_grid(spec, resume)

    def attribution(
        self,
        site: str,
        *,
        over: Iterable[str] | str = ("layer", "pos"),
        into: str | None = None,
        values: PutThere = None,
        weight: float = 1.0,
        layers: Sequence[int] | None = None,
        heads: Heads | None = None,
        positions: Sequence[int] | None = None,
        exact: PatchGridResult | None = None,
    ) -> AttributionPatchResult:
        """Estimate a grid to first order: (value - own value) x gradient of the metric.

        The estimate is exact only if the metric is linear in the activation over the whole patch. Give
        `exact` to see how far it can be trusted.

        Args:
            site: an activation, such as `resid_pre`, `mlp_out` or `z`.
            over: the axes of the grid, some of "layer", "head" and "pos".
            into: the run to patch, "clean" or "corrupted"; None is "corrupted" if there is a corrupted run
                and `values` is not given.
            values: what to patch in; None is the other run's value.
            weight: how much of the values to mix in; 1 replaces the activation.
            layers: the layers to patch; None is all.
            heads: the heads to patch, such as ["L3H5"]; None is all.
            positions: the positions to patch; None is all.
            exact: the result of `grid` with the same arguments; the estimate is correlated with it.

        Returns:
            An estimate of each cell's effect.

        Raises:
            ValueError: an argument that does not fit the model; a metric whose gradient at the patched run is
                zero, such as KL(clean || patched) at the clean run; attention scores that become minus
                infinity; an `exact` made with other arguments.

        Example:
            >>> text = "The old woman went to the {}. The old woman went to the"
            >>> metric = mechlens.LogitDiff(" sea", " town")
            >>> experiment = mechlens.Patching(model, text.format("sea"), text.format("town"), metric=metric)
            >>> exact = experiment.grid("z", over=("layer", "head"))
            >>> experiment.attribution("z", over=("layer", "head"), exact=exact).correlation > 0.9
            True

        References: Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale".
        Cost: one forward and backward pass for each prompt, one forward pass for its counterpart, and what
        the values need. The activations of one prompt at a time are in memory.
        """
        spec = GridSpec.of(
            self,
            site,
            over=over,
            into=into,
            values=values,
            weight=weight,
            layers=layers,
            heads=heads,
            positions=positions,
        )
        return estimate_grid(spec, exact)

    def path(
        self,
        sender: Head,
        receiver: str,
        *,
        into: str | None = None,
        values: PutThere = None,
        positions: Sequence[int] | None = None,
    ) -> PatchGridResult:
        """Patch one head's output only as one other component sees it: the direct path between the two.

        The change in the sender's output is added to the stream that the receiver's `q`, `k`, `v` or MLP is
        computed from, before the block's norm. Components in between, and the receiver's other inputs, read
        the unpatched stream. The effect on the receiver's output propagates to all later layers.

        Args:
            sender: a head, such as "L1H2", whose `z` is patched.
            receiver: an input of a later head, such as "L3H5.q", "L3H5.k" or "L3H5.v", or an MLP, such as
                "L3.mlp". With grouped-query attention, give `k` and `v` with the number of the key/value
                head; all query heads that share it are affected.
            into: the run to patch, "clean" or "corrupted"; None is "corrupted" if there is a corrupted run
                and `values` is not given.
            values: the new value of the sender's `z`; None is its value in the other run.
            positions: where to patch the sender; None is everywhere.

        Returns:
            A grid with one cell, the receiver's; `source` names the path.

        Raises:
            ValueError: a receiver that does not read what the sender writes, or an argument that does not fit
                the model.

        Example:
            >>> experiment = mechlens.Patching(model, "She went to the sea", "She went to the town")
            >>> experiment.path("L1H2", "L3H5.k").source
            'L1H2 (the clean run) as the k of L3H5 sees it'

        References: Wang et al. 2022, "Interpretability in the Wild", arXiv:2211.00593; Goldowsky-Dill et al.
        2023, "Localizing Model Behavior with Path Patching", arXiv:2304.05969.
        Cost: one forward pass of the prompts and one of their counterparts, and three more: on a
        HookedTransformer only from the sender's or the receiver's layer on, otherwise full ones.
        """
        return run_path(self, sender, receiver, into=into, values=values, positions=positions)

    def path_attention(
        self,
        sender: Head,
        receiver: Head,
        *,
        into: str | None = None,
        values: PutThere = None,
        positions: Sequence[int] | None = None,
    ) -> Float[Tensor, "prompt dest src"]:
        """The attention pattern of one head when another head's output is patched.

        Args:
            sender: a head, such as "L1H2", whose `z` is patched.
            receiver: the head whose pattern to return. "L3H5.q" and "L3H5.k" see the patch only through that
                input; with "L3H5", the sender is patched for all components. Always give the number of the
                query head, even with grouped-query attention.
            into: the run to patch, "clean" or "corrupted"; None is "corrupted" if there is a corrupted run
                and `values` is not given.
            values: the new value of the sender's `z`; None is its value in the other run.
            positions: where to patch the sender; None is everywhere.

        Returns:
            Attention after softmax, in [0, 1], in float32 on the CPU.

        Raises:
            ValueError: a receiver that does not read what the sender writes, or an argument that does not fit
                the model.

        Example:
            >>> experiment = mechlens.Patching(model, "said Mr. Pickwick")
            >>> experiment.path_attention("L1H2", "L3H5.k", values="zero")[0].sum(-1).round()
            tensor([1., 1., 1., ...])

        Cost: one forward pass of the prompts and one of their counterparts, and partial ones from the
        sender's and the receiver's layer on.
        """
        return attention_on_path(self, sender, receiver, into=into, values=values, positions=positions)

    def blocks(
        self, how: str | LensModel, *, into: str = "clean", layers: Sequence[int] | None = None
    ) -> PatchGridResult:
        """Skip or repeat one block at a time, or run another model's block in its place.

        Args:
            how: "skip" replaces the block's output with its input; "repeat" runs the block again on its own
                output; another model with the same number of layers and `d_model` runs its block of the same
                layer on the block's input.
            into: the run to patch, "clean" or "corrupted".
            layers: the layers whose blocks to patch, one at a time; None is all.

        Returns:
            A grid over layers, like that of patching `resid_post` at all positions.

        Raises:
            ValueError: an invalid `how`, a model of another shape, or a layer that the model does not have.

        Example:
            >>> mechlens.Patching(model, "said Mr. Pickwick").blocks("skip").effect.shape
            torch.Size([4])

        Cost: one forward pass for each prompt; for each prompt and layer the layers after it, and at most two
        runs of that block (on a TransformerBridge, two forward passes).
        """
        source = block_source(self.model, how)
        return self.grid("resid_post", over="layer", into=into, values=source, layers=layers)
