"""Attribution patching: a first-order estimate of a grid, from one backward pass."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechlens.analyses.patching.metrics import KL
from mechlens.analyses.patching.spec import Cells, GridSpec
from mechlens.models.run.clean_run import CleanRun
from mechlens.models.run.gradients import gradients
from mechlens.models.run.sites import SITES, by_position, last_hook
from mechlens.results import AttributionPatchResult, PatchGridResult


def estimate_grid(spec: GridSpec, exact: PatchGridResult | None) -> AttributionPatchResult:
    """Estimate every cell; see `Patching.attribution`."""
    experiment, model = spec.experiment, spec.experiment.model
    if isinstance(experiment.metric, KL) and spec.into == "clean":
        raise ValueError(
            "KL(clean || patched) is smallest at the clean run, so its gradient there is zero: use another "
            "metric, or grid"
        )
    if spec.site == "attn_scores" and spec.source.knocks_out:
        raise ValueError(
            "knocking an edge out makes its score minus infinity, which has no first-order estimate: use the "
            "site pattern, or grid"
        )
    if exact is not None:
        _check_exact(exact, spec)
    layers, n_prompts = spec.cells.layers, len(experiment.tokens)
    hooks = {layer: SITES[spec.site].format(layer) for layer in layers}
    estimate = torch.empty(n_prompts, *spec.cells.shape, dtype=torch.float32)
    metrics: dict[str, Tensor] = {
        name: torch.full((n_prompts,), torch.nan, dtype=torch.float32) for name in ("clean", "corrupted")
    }
    values_of = spec.source.values(model, spec.site, layers)
    patched, unpatched = ("clean", "corrupted") if spec.into == "clean" else ("corrupted", "clean")
    for index in range(n_prompts):
        tokens, others = experiment.runs(index, spec.into)
        other = None if others is None else CleanRun.of(model, others, spec.keep(own=False))

        def metric(final: Tensor, index: int = index, other: CleanRun | None = other) -> Tensor:
            clean = final if other is None or spec.into == "clean" else other.final
            return experiment.readout.of_prompt(index, clean.detach()).differentiable(final, 0, final)[0]

        names = dict.fromkeys([*hooks.values(), *spec.keep(own=True), last_hook(model)])
        value, kept, by = gradients(model, tokens, list(names), metric)
        own = CleanRun(model, tokens, kept)
        metrics[patched][index] = value
        if other is not None:
            clean = own if spec.into == "clean" else other
            metrics[unpatched][index] = experiment.readout.of_prompt(index, clean.final).of_run(other.final)
        values = values_of(own, other or own, index)
        with torch.no_grad():
            terms = [
                _terms(values(layer), own.at(spec.site, layer)[0], by_position(by[name], spec.site)[0])
                for layer, name in hooks.items()
            ]
            estimate[index] = spec.weight * _cells(torch.stack(terms), spec.cells).cpu()
    estimate.masked_fill_(~spec.cells.asked, torch.nan)
    correlation = None if exact is None else _correlation(exact, estimate, metrics["clean"])
    return AttributionPatchResult(**(spec.fields() | metrics), estimate=estimate, correlation=correlation)


def _terms(
    value: Float[Tensor, "pos *rest last"],
    own: Float[Tensor, "pos *rest last"],
    gradient: Float[Tensor, "pos *rest last"],
) -> Float[Tensor, "pos *rest"]:
    change, gradient = value.to(own.device).float() - own.float(), gradient.float()
    # scores of masked edges are minus infinity in both runs and have no effect
    return (change * gradient).masked_fill(gradient == 0, 0).sum(-1)


def _cells(terms: Float[Tensor, "layer pos *head"], cells: Cells) -> Tensor:
    """Terms summed over what each grid cell covers."""
    by_head = terms.reshape(*terms.shape[:2], -1).transpose(1, 2)
    if "head" in cells.axes:
        by_head = by_head[:, list(cells.numbers)]
    else:
        some = [row[cells.heads_in(layer)].sum(0) for layer, row in zip(cells.layers, by_head, strict=True)]
        by_head = torch.stack(some)[:, None]
    if cells.positions is not None:
        by_head = by_head[..., list(cells.positions)]
    if "pos" not in cells.axes:
        by_head = by_head.sum(2, keepdim=True)
    if "layer" not in cells.axes:
        by_head = by_head.sum(0, keepdim=True)
    return by_head.reshape(cells.shape)


def _check_exact(exact: PatchGridResult, spec: GridSpec) -> None:
    ours = spec.fields()
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
            f"the exact grid was made with {', '.join(differ)}: give the result of grid with the same "
            f"arguments"
        )


def _correlation(
    exact: PatchGridResult, estimate: Float[Tensor, "prompt *grid"], clean: Float[Tensor, " prompt"]
) -> float:
    # the clean metric may reveal differences that results do not store, such as a function's code
    if not torch.allclose(exact.clean, clean, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"the exact grid's clean run has {exact.metric} {exact.clean.tolist()}, but here it is "
            f"{clean.tolist()}: give the result of grid with the same metric"
        )
    pair = torch.stack([estimate.mean(0).flatten(), exact.effect.flatten()]).double()
    pair = pair[:, pair.isfinite().all(0)]
    pair = pair - pair.mean(1, keepdim=True)
    span = pair.norm(dim=1).prod()
    return float((pair[0] @ pair[1]) / span) if span > 0 else float("nan")
