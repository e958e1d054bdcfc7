"""Attribution patching: the whole grid to first order, from one backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.analyses.patching.metrics import Metric, Targets
from mechlens.analyses.patching.sources import ATTENTION, Source, values_of
from mechlens.analyses.patching.spec import Asked, Grid
from mechlens.models.protocol import LensModel
from mechlens.models.run.gradients import gradients
from mechlens.models.run.patched_runs import SITES
from mechlens.models.run.properties import last_residual
from mechlens.results import AttributionPatchResult, PatchGridResult
from mechlens.text.prompts import Prompt


def attribution_patching(
    model: LensModel,
    prompt: Prompt,
    *,
    site: str,
    source: Source,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | str | None = None,
    positions: Sequence[int] | str | None = "each",
    weight: float = 1.0,
    metric: Metric = "loss",
    read: Sequence[int] | None = None,
    targets: Targets | None = None,
    against: Targets | None = None,
    direction: str = "noising",
    prepend_bos: bool | None = None,
    exact: PatchGridResult | None = None,
) -> AttributionPatchResult:
    """Approximate the effects of `patch_grid` by (source's value - own value) x gradient of the metric.

    This is the first term of a series, no patched run: exact only where the metric is linear in the
    activation over the whole way of the patch. Give `exact` to see how far it can be trusted.

    Args:
        exact: the result of `patch_grid` with the same arguments; the estimate is correlated with it.

    The other arguments are those of `patch_grid`.

    Returns:
        An estimate of each cell's effect.

    Raises:
        ValueError: as `patch_grid`; a metric without a gradient at the run that is patched, such as KL(clean
            || patched) at the clean run; attention scores that would become minus infinity; or an `exact`
            of other arguments (what differs is named).

    Source: Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale".
    Cost: for each prompt one forward and backward pass, and a forward pass over what the source reads; one
    more where there is a corrupted run, for its metric. The activations of one prompt's run are in memory.
    """
    if metric == "kl" and direction == "noising":
        raise ValueError(
            "KL(clean || patched) is smallest at the clean run, so its gradient there is zero and tells "
            "nothing: choose another metric, or patch_grid"
        )
    if site == "attn_scores" and source == "zero":
        raise ValueError(
            "knocking an edge out makes its score minus infinity, which no gradient reaches: use site "
            "pattern, or patch_grid"
        )
    asked = Asked.of(
        model,
        prompt,
        site=site,
        source=source,
        layers=layers,
        heads=heads,
        positions=positions,
        weight=weight,
        metric=metric,
        read=read,
        targets=targets,
        against=against,
        direction=direction,
        prepend_bos=prepend_bos,
    )
    if exact is not None:
        _check_exact(exact, asked)
    judge, grid = asked.judge, asked.grid
    names = {layer: SITES[site].format(layer) for layer in grid.layers}
    estimate = torch.empty(len(asked.tokens), *grid.shape, dtype=torch.float32)
    clean = torch.empty(len(asked.tokens), dtype=torch.float32)
    corrupted = torch.full_like(clean, torch.nan)
    for index in range(len(asked.tokens)):
        base, given = asked.runs(index)
        if asked.other is not None:
            final = last_residual(model, given)
            if direction == "denoising":
                judge.begin(index, final)
        judge.prompt = index
        metric_of, own, by = gradients(
            model, base, list(names.values()), lambda last: judge.differentiable(last, 0, last)[0]
        )
        here, there = (clean, corrupted) if direction == "noising" else (corrupted, clean)
        here[index] = metric_of
        if asked.other is not None:
            there[index] = judge.of_run(final)
        kept = {layer: _by_position(own[name], site) for layer, name in names.items()}
        values = values_of(
            model, source, site, given, index, grid.layers, kept=kept if given is base else None
        )
        with torch.no_grad():
            terms = [
                _terms(values(layer), kept[layer][0], _by_position(by[name], site)[0])
                for layer, name in names.items()
            ]
            estimate[index] = weight * _cells(torch.stack(terms), grid).cpu()
    return AttributionPatchResult(
        **asked.fields(),
        estimate=estimate,
        clean=clean,
        corrupted=corrupted,
        correlation=None if exact is None else _correlation(exact, asked, estimate, clean),
    )


def _by_position(activation: Tensor, site: str) -> Tensor:
    return activation.movedim(1, 2) if site in ATTENTION else activation


def _terms(
    value: Float[Tensor, "pos *rest last"],
    own: Float[Tensor, "pos *rest last"],
    gradient: Float[Tensor, "pos *rest last"],
) -> Float[Tensor, "pos *rest"]:
    change, gradient = value.to(own.device).float() - own.float(), gradient.float()
    # scores of masked edges are minus infinity in both runs, and nothing depends on them
    return (change * gradient).masked_fill(gradient == 0, 0).sum(-1)


def _cells(terms: Float[Tensor, "layer pos *head"], grid: Grid) -> Tensor:
    """Summed over what each cell of the grid covers."""
    by_head = terms.reshape(*terms.shape[:2], -1).transpose(1, 2)
    by_head = by_head.sum(1, keepdim=True) if grid.heads is None else by_head[:, list(grid.heads)]
    cells = by_head.sum(2, keepdim=True) if grid.positions is None else by_head[..., list(grid.positions)]
    return cells.reshape(grid.shape)


def _check_exact(exact: PatchGridResult, asked: Asked) -> None:
    ours = asked.fields()
    differ = [
        f"{name} {getattr(exact, name)!r}, not {value!r}"
        for name, value in ours.items()
        if name not in ("tokens", "strings", "given") and getattr(exact, name) != value
    ]
    ids, own = ({"tokens": each["tokens"]} | each["given"] for each in (vars(exact), ours))
    differ += [
        f"other {name}"
        for name in sorted({*ids, *own})
        if name not in ids or name not in own or not torch.equal(ids[name], own[name])
    ]
    if differ:
        raise ValueError(
            f"the exact grid was made with {', '.join(differ)}: give the result of patch_grid with the same "
            "arguments"
        )


def _correlation(
    exact: PatchGridResult,
    asked: Asked,
    estimate: Float[Tensor, "prompt *grid"],
    clean: Float[Tensor, " prompt"],
) -> float:
    # what a result does not hold, such as a function's code, may show in the clean run's metric
    if not torch.allclose(exact.clean, clean, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"the exact grid's clean run has {exact.metric} {exact.clean.tolist()}, but here it is "
            f"{clean.tolist()}: give the result of patch_grid with the same metric"
        )
    pair = torch.stack([estimate.mean(0).flatten(), exact.effect.flatten()]).double()
    pair = pair[:, pair.isfinite().all(0)]
    pair = pair - pair.mean(1, keepdim=True)
    span = pair.norm(dim=1).prod()
    return float((pair[0] @ pair[1]) / span) if span > 0 else float("nan")
