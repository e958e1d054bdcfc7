"""Whole blocks skipped, repeated, or exchanged for another model's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from jaxtyping import Int
from torch import Tensor

from mechlens.analyses.patching.grid import patch_grid
from mechlens.analyses.patching.metrics import Metric, Targets
from mechlens.analyses.patching.sources import Made
from mechlens.arguments import check_model, chosen
from mechlens.models.protocol import LensModel, describe, engine_of
from mechlens.models.run.forward import watch, watch_from
from mechlens.models.run.patched_runs import SITES, start_sweeps
from mechlens.results import PatchGridResult
from mechlens.text.prompts import Prompt


def patch_blocks(
    model: LensModel,
    prompt: Prompt,
    how: str | LensModel,
    *,
    layers: Sequence[int] | None = None,
    metric: Metric = "loss",
    read: Sequence[int] | None = None,
    targets: Targets | None = None,
    against: Targets | None = None,
    prepend_bos: bool | None = None,
    token_budget: int | None = None,
    progress: bool | None = None,
) -> PatchGridResult:
    """Skip or repeat one block at a time, or run another model's in its place, and measure the prediction.

    Args:
        how: `skip` hands the block's input on; `repeat` runs the block a second time, on its own output; a
            model of as many layers and the same `d_model` runs its own block of that layer on what the
            block would have read.
        layers: None takes each layer.

    The other arguments are those of `patch_grid`.

    Returns:
        A grid of layers, as of patches of `resid_post` at all positions.

    Raises:
        ValueError: another `how`, a model of another shape, or what `patch_grid` refuses.

    Cost: as `patch_grid`, and for each prompt and layer one more run of that block (on a bridge, of a whole
    model: its blocks cannot be called one by one).
    """
    check_model(model)
    if isinstance(how, str):
        if how not in ("skip", "repeat"):
            raise ValueError(f"how must be skip, repeat or a model, but is {how!r}")
        name, other = how, model
    else:
        name, other = f"block of {describe(how).name}", how
        if (how.cfg.n_layers, how.cfg.d_model) != (model.cfg.n_layers, model.cfg.d_model):
            raise ValueError(
                f"the other model has {how.cfg.n_layers} layers and d_model {how.cfg.d_model}, this one "
                f"{model.cfg.n_layers} and {model.cfg.d_model}: blocks can be exchanged between equals only"
            )
    begin = SITES["resid_post" if how == "repeat" else "resid_pre"]
    wanted = chosen("layer", layers, model.cfg.n_layers)

    def make(tokens: Int[Tensor, "1 pos"], index: int) -> dict[int, Tensor]:
        given: dict[int, Tensor] = {}
        watch(model, tokens, {begin.format(at): partial(given.__setitem__, at) for at in wanted})
        if how != "skip":
            # the blocks are called alone, without what the model may give them beside the stream
            alone = engine_of(other) != "HookedTransformer" or tokens.shape[1] < 2
            begun = None if alone else start_sweeps(other, tokens, "resid_post")
            if begun is not None and begun.clean is None:
                raise ValueError(f"prompt {index} cannot be run from the middle of the model on: {begun.why}")
            for at in wanted:
                end = SITES["resid_post"].format(at)
                read_from = given[at].to(other.W_U)
                watch_from(other, at, read_from, {end: partial(given.__setitem__, at)})
        return {at: value[0] for at, value in given.items()}

    return patch_grid(
        model,
        prompt,
        site="resid_post",
        source=Made(name, make),
        layers=wanted,
        positions=None,
        metric=metric,
        read=read,
        targets=targets,
        against=against,
        prepend_bos=prepend_bos,
        token_budget=token_budget,
        progress=progress,
    )
