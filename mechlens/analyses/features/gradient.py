"""Gradient search: optimize embeddings, and decode them to tokens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.features.objectives import AnyObjective, Continue, Maximize, Objective
from mechlens.analyses.features.optimization import TENSORS, Optimization, Optimizer, Prior, Space
from mechlens.analyses.features.spec import PrefixLike
from mechlens.arguments import check_model, check_type, generator_of, whole_number
from mechlens.measures.hashing import content_hash
from mechlens.models.protocol import LensModel
from mechlens.models.run.from_embeddings import token_embeddings
from mechlens.results import GradientSearch
from mechlens.results.checkpoint import Checkpoint
from mechlens.text.tokens import drawable_tokens


def search_gradient(
    model: LensModel,
    objective: AnyObjective,
    *,
    n_tokens: int,
    prefix: PrefixLike = None,
    optimizer: Optimizer | None = None,
    prior: Prior | None = None,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> GradientSearch:
    """Optimize embeddings by gradient descent until they activate features, and decode them to tokens.

    A feature is a basis dimension of an activation, or a direction in the residual stream. Restarts begin at
    the embeddings of random tokens, except that each special token starts one of them (up to half), because
    special tokens are far from the others and often activate features most. Every few steps the embeddings
    are decoded in two ways, by the pseudo-inverse of the embedding matrix and by the largest cosine, and the
    decoded tokens are run. Each restart keeps the tokens with the best objective.

    Args:
        model: with unprocessed weights.
        objective: `Maximize` or `Match` for features of one layer, or `Continue` for a text.
        n_tokens: how many tokens to search for together.
        prefix: text or token ids before the searched tokens; `Prefix` adds BOS.
        optimizer: optimizer, steps and restarts; None is `Optimizer()`.
        prior: keeps the embeddings close to real ones; None does not constrain them.
        seed: for drawing the starts.
        resume: a `.safetensors` file to save progress to, every half minute and when the search ends or is
            interrupted. If the file exists, the search resumes from it.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        What every restart found. `best_ids()` gives the best tokens and `best_activation()` their mean
        activation; for a continuation, `best_objective()` is minus its log-probability (nats).

    Raises:
        TypeError: a value of the wrong type.
        ValueError: processed weights, several layers, an index that selects nothing or is out of range, a
            target of the wrong length, an optimum from another search or above the constant, more tokens than
            fit in the context, a checkpoint from another search, or, for a continuation, a model whose logits
            involve more than its final norm, `W_U`, `b_U` and a soft-cap.

    Example:
        >>> feature = mechlens.Features(layers=2, indices=7)
        >>> few = mechlens.Optimizer(steps=5, restarts=4)
        >>> found = mechlens.search_gradient(raw, mechlens.Maximize(feature), n_tokens=1, optimizer=few)
        >>> found.best_ids().shape
        torch.Size([1])

    References: Badger, "Language Model Features", which uses one start and plain gradient descent, and
        decodes by the pseudo-inverse at the end.
    Cost: per step, one forward and one backward pass over the restarts up to the layer; every fifth step, two
        products with `W_E` and a forward pass over the distinct decoded tokens.
    """
    check_model(model)
    optimizer = Optimizer() if optimizer is None else optimizer
    check_type("optimizer", optimizer, Optimizer)
    if prior is not None:
        check_type("prior", prior, Prior)
    n_tokens = whole_number("n_tokens", n_tokens, least=1)
    draw = generator_of(seed)
    with torch.inference_mode(False), torch.enable_grad():
        E = token_embeddings(model).float()
        bound = Objective.of(objective, model, n_tokens, prefix, E.to(model.W_E.dtype))
        optimum = _optimum(bound)
        softmax = prior is not None and prior.name == "softmax"
        free = _starts(model, E, optimizer.restarts, n_tokens, draw, softmax)
        rate = optimizer.learning_rate * (1 if softmax else float(E.square().mean().sqrt()))
        if bound.asked.name == "constant" and getattr(objective, "constant", None) is None:
            bound = bound.beyond(free.detach() @ E if softmax else free.detach())
        torch_optimizer = getattr(torch.optim, optimizer.name)([free], lr=rate)
        work = Optimization(bound, Space.of(E), prior, free, torch_optimizer)
        with Checkpoint(
            resume,
            "search",
            lambda: bound.spec.fingerprint | _arguments(bound, optimizer, prior, seed),
            owner="a gradient search",
            names=TENSORS,
        ) as saved:
            _run(work, saved, optimizer, progress)
        return _result(work, optimizer, prior, seed, optimum)


def _starts(
    model: LensModel, E: Tensor, restarts: int, n_tokens: int, draw: torch.Generator, softmax: bool
) -> Float[Tensor, "restart pos width"]:
    """Embeddings of random tokens, or random distributions over tokens."""
    if softmax:
        drawn = torch.randn(restarts, n_tokens, len(E), generator=draw, dtype=torch.float32).to(E.device)
        return drawn.softmax(-1).requires_grad_()
    return E[_first_tokens(model, restarts, n_tokens, draw).to(E.device)].clone().requires_grad_()


def _first_tokens(
    model: LensModel, restarts: int, n_tokens: int, draw: torch.Generator
) -> Int[Tensor, "restart pos"]:
    """Random tokens, except that each of the first restarts repeats one special token."""
    drawable = drawable_tokens(model.tokenizer, model.cfg.d_vocab)
    ids = drawable[torch.randint(len(drawable), (restarts, n_tokens), generator=draw)]
    n_named = model.cfg.d_vocab if model.tokenizer is None else min(len(model.tokenizer), model.cfg.d_vocab)
    named = torch.arange(n_named)
    special = named[~torch.isin(named, drawable)][: restarts // 2]
    ids[: len(special)] = special[:, None]
    return ids


def _arguments(bound: Objective, optimizer: Optimizer, prior: Prior | None, seed: int) -> dict[str, Any]:
    """The arguments, besides the features, that must match those of a checkpoint."""
    return {
        "selection": content_hash(bound.selected),
        "n_tokens": bound.n_tokens,
        "objective": bound.asked.name,
        "target": None if bound.target is None else content_hash(bound.target),
        "constant": bound.constant if bound.asked.name == "constant" else None,
        "prior": prior and prior.name,
        "prior_weight": prior and prior.weight,
        "optimizer": optimizer.name,
        "learning_rate": optimizer.learning_rate,
        "steps": optimizer.steps,
        "patience": optimizer.patience,
        "restarts": optimizer.restarts,
        "seed": seed,
        "isolated": bound.alone is not None,
    }


def _run(work: Optimization, saved: Checkpoint, optimizer: Optimizer, progress: bool | None) -> None:
    """Run the remaining steps."""
    if saved.tensors:
        work.restore(saved.tensors)
    else:
        work.begin()
    # steps change tensors in place, so a checkpoint saves copies made after the last full step
    whole = saved.tensors

    def made() -> Iterator[None]:
        nonlocal whole
        while work.steps < optimizer.steps and work.stalled < optimizer.patience:
            work.step()
            if saved.path is not None:
                whole = work.tensors()
            yield

    for _ in saved.loop(
        made(),
        lambda: (whole, whole["objectives"].shape[1] if whole else 0),
        total=optimizer.steps,
        desc="searching",
        unit="step",
        progress=progress,
    ):
        pass


def _result(
    work: Optimization, optimizer: Optimizer, prior: Prior | None, seed: int, optimum: float | None
) -> GradientSearch:
    bound, spec = work.objective, work.objective.spec
    last = work.end()
    found = work.embedded(work.best)
    ids = {way: each.ids for way, each in work.decoded.items()}
    fields = spec.fields()
    del fields["features"]
    return GradientSearch(
        **fields,
        layer=spec.layer,
        selected=bound.selected,
        objective=bound.asked.name,
        target_ids=bound.target,
        constant=bound.constant if bound.asked.name == "constant" else None,
        prior=prior.name if prior else "none",
        prior_weight=prior.weight if prior else None,
        optimizer=optimizer.name,
        learning_rate=optimizer.learning_rate,
        isolated=bound.alone is not None,
        seed=seed,
        objectives=torch.stack(work.objectives, dim=1),
        activations=torch.stack(work.activations, dim=1),
        embeddings=found.cpu().clone(),
        nearest_cosine=work.space.cosines(found).amax(-1).cpu(),
        token_cosine=work.space.between_tokens(),
        decoded_ids=last,
        ids=ids,
        true_objectives={way: each.objective for way, each in work.decoded.items()},
        true_activations={way: each.activation for way, each in work.decoded.items()},
        selected_activations={way: bound.activations(each, work.rows) for way, each in ids.items()},
        optimum=optimum,
        strings=spec.strings(
            *last.values(), *ids.values(), *([] if bound.target is None else [bound.target])
        ),
    )


def _optimum(bound: Objective) -> float | None:
    """The activation that the exhaustive search found.

    Raises:
        ValueError: the search was not for the same feature.
    """
    asked = bound.asked
    if isinstance(asked, Continue) or not isinstance(asked, Maximize) or asked.optimum is None:
        return None
    search, spec, n = asked.optimum, bound.spec, len(bound.places)
    leave = "leave optimum out"
    if asked.how == "min" or bound.n_tokens != 1 or n != 1:
        raise ValueError(
            f"optimum is the largest activation of one feature at one token, but the search is for {n} "
            f"activations of {bound.n_tokens} tokens (how={asked.how!r}): {leave}"
        )
    if asked.isolated:
        raise ValueError(f"optimum is from the whole model, but isolated is True: {leave}")
    feature = int(bound.selected[0, 1])
    same_directions = search.directions is None or (
        spec.directions is not None and torch.equal(search.directions, spec.directions)
    )
    for what, same in (
        ("model", search.model == spec.info),
        ("site", search.site == spec.site),
        ("directions", same_directions),
        ("prefix", torch.equal(search.prefix, spec.prefix)),
        ("layer", spec.layer in search.layers),
        ("feature", feature in search.features),
    ):
        if not same:
            raise ValueError(f"optimum is from a search with another {what}: {leave}, or repeat that search")
    at = search.layers.index(spec.layer), search.features.index(feature)
    claimed, own = float(search.activations[at][0]), float(bound.activations(search.ids[at][:1, None], 1))
    # summation order depends on shapes; relative to the feature's range, because some are far larger
    tolerance = 1e-3 if bound.embeddings.dtype in (torch.float32, torch.float64) else 0.1
    ends = torch.stack([search.activations[at[0]], search.lowest_activations[at[0]]]).abs()
    if not abs(own - claimed) <= tolerance * float(ends[:, at[1]].amax() + 0.01 * ends.amax()):
        raise ValueError(
            f"optimum is from other weights: its best token has an activation of {claimed:.6g} there and "
            f"{own:.6g} here: repeat that search"
        )
    if asked.constant is not None and asked.constant < claimed:
        raise ValueError(
            f"the optimum {claimed:.6g} is above the constant {asked.constant:g}: {leave}, or use a larger "
            "constant"
        )
    return claimed
