"""Gradient search: embeddings that excite a feature, and the tokens that they are nearest to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechlens.analyses.features.objectives import OBJECTIVES, Judge
from mechlens.analyses.features.optimization import PENALTIES, PRIORS, TENSORS, Space, Walk
from mechlens.analyses.features.spec import Sought, hashed
from mechlens.arguments import check_counts, check_model, check_reals, generator_of
from mechlens.models.protocol import LensModel
from mechlens.models.run.from_embeddings import token_embeddings
from mechlens.results import CompleteSearch, GradientSearch
from mechlens.results.checkpoint import Checkpoint
from mechlens.text.tokens import drawable_tokens

FASTEST = 1e6
"""A learning rate beyond all sense; what is beyond float32 ends within torch's optimisers."""
LARGE = 1000.0
"""The constant, where no activation comes near."""
OPTIMISERS = ("Adadelta", "Adagrad", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")


def search_gradient(
    model: LensModel,
    *,
    layer: int | None = None,
    selection: Any = None,
    n_tokens: int,
    objective: str = "constant",
    target: str | Int[Tensor, "*one target"] | None = None,
    constant: float | None = None,
    prior: str = "none",
    prior_weight: float = 1.0,
    optimiser: str = "Adam",
    learning_rate: float = 0.1,
    steps: int = 40,
    patience: int = 10,
    restarts: int = 64,
    seed: int = 0,
    isolated: bool = False,
    site: str = "resid_post",
    directions: Float[Tensor, "direction d_model"] | None = None,
    prefix: str | Int[Tensor, "*one prefix"] | None = None,
    prepend_bos: bool = False,
    complete: CompleteSearch | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> GradientSearch:
    """Change embeddings by gradients until they excite features, and read them as tokens.

    The embeddings begin as those of random tokens; special tokens, which lie apart from the others and often
    excite features most, begin a restart each (half of them at most). At first and every few steps they are
    decoded in two ways, by the pseudo-inverse of the embedding and by the largest cosine, and the tokens are
    run: of all that a restart passes, the tokens with the best objective are kept.

    Args:
        layer: whose features they are; a continuation has none.
        selection: any index of `[pos, feature]`, such as `np.s_[:, 7]`, `np.s_[2, 7]` or `np.s_[:, 0:4]`,
            where `pos` counts the searched tokens only; None selects all.
        n_tokens: how many tokens are searched together.
        objective: what is made small. `constant`: the L1 distance of the selected activations to a large
            constant, as in the source; `maximise`: minus the activations; `maximin`: minus the smallest of
            them, to excite several features alike; `l1` and `cosine`: the distance to those of the target,
            another input; `continuation`: minus the log-probability (nats) of the target behind the searched
            tokens, which reads no feature. `constant`, `maximise` and `l1` are means over what is selected.
        target: a text or ids: as many tokens as are searched, or the continuation.
        constant: of the objective `constant`. What is larger is made smaller, so it must lie beyond all that
            is to be found; None takes 1000, or ten times the largest activation of the starts.
        prior: `none`; `softmax`: what is changed is a distribution over tokens, made one by a softmax after
            each step (the source's; slow at the default learning rate: try SGD with one of 100); `norm` and
            `nearest` add a penalty, summed over the searched tokens, for embeddings of another norm than the
            mean of real ones (square of the relative difference), or far from the nearest real one (1 minus
            the cosine).
        prior_weight: what the penalty is multiplied by.
        optimiser: one of torch's: Adadelta, Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop, SGD.
        learning_rate: in units of the root mean square of a real embedding's elements; for `softmax` as it
            is.
        steps: at most.
        patience: stop when no restart has got better for so many steps.
        restarts: independent starts, run as one batch (in parts where memory runs out).
        seed: of the `torch.Generator` that draws the starts.
        isolated: the layer's block alone, on what the first block would get, without the blocks before.
        site: as in `search_complete`; so are `directions`, `prefix` and `prepend_bos`.
        complete: a complete search of the same features, to compare with; for one token and one feature that
            is to get large.
        resume: a `.safetensors` file to save progress to, every half minute and when the search ends or is
            interrupted. If the file exists, the search resumes from it.
        progress: show a bar; None shows one in a terminal and in Jupyter.

    Returns:
        What every restart found: the best tokens by `best_ids()`, what they reach by `best_activation()`
        (of a continuation `best_objective()`, minus its log-probability), each selected activation by
        `best_activations()`, all of it by `to_dataframe()`.

    Raises:
        TypeError: a value of the wrong kind.
        ValueError: as `search_complete`; an index that selects nothing or is out of range, an unknown
            objective, prior or optimiser, a target that is missing, too many or of another length, a complete
            search of something else or of more than the constant, a checkpoint of another search, or
            (`continuation`) logits that are more than norm, `W_U` and `b_U`.

    Source: Badger, "Language Model Features"; it has one start, plain gradient descent, and the decoding by
    the pseudo-inverse at the end.
    Cost: per step one forward and one backward pass of the restarts up to the layer, and every fifth step two
    products with `W_E` and a forward pass of the different tokens that they stand for.
    """
    check_model(model)
    if layer is None and objective != "continuation":
        raise ValueError(f"the objective {objective!r} reads features of a layer: say which by layer=")
    if objective == "continuation":
        for name, given in (("selection", selection), ("layer", layer)):
            if given is not None:
                raise ValueError(f"a continuation reads no feature: leave {name} out")
    sought = Sought.of(
        model,
        site=site,
        layers=[-1 if layer is None else layer],
        features=None,
        directions=directions,
        prefix=prefix,
        prepend_bos=prepend_bos,
    )
    for name, given, known in (
        ("objective", objective, OBJECTIVES),
        ("prior", prior, PRIORS),
        ("optimiser", optimiser, OPTIMISERS),
    ):
        if given not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, but is {given!r}")
    check_counts(n_tokens=n_tokens, steps=steps, patience=patience, restarts=restarts)
    check_reals(learning_rate=learning_rate, prior_weight=prior_weight, constant=constant)
    if not isinstance(isolated, bool):
        raise TypeError(f"isolated must be True or False, but is {isolated!r}")
    if not 0 < learning_rate <= FASTEST:
        raise ValueError(f"learning_rate must be above 0 and at most {FASTEST:g}, but is {learning_rate}")
    if prior_weight < 0:
        raise ValueError(f"prior_weight must be a finite number from 0 on, but is {prior_weight}")
    draw = generator_of(seed)
    with torch.inference_mode(False), torch.enable_grad():
        E = token_embeddings(model).float()
        judge = Judge.of(
            sought,
            selection,
            n_tokens,
            objective,
            target,
            LARGE if constant is None else constant,
            isolated,
            E.to(model.W_E.dtype),
        )
        space = Space.of(E)
        optimum = None if complete is None else _optimum(complete, sought, judge, n_tokens)
        if constant is not None and optimum is not None and constant < optimum:
            raise ValueError(
                f"the complete search reached {optimum:.6g}, but the search is for {constant:g}, which is "
                "less: leave complete out, or take a larger constant"
            )
        if prior == "softmax":
            drawn = torch.randn(restarts, n_tokens, len(E), generator=draw, dtype=torch.float32).to(E.device)
            free, rate = drawn.softmax(-1).requires_grad_(), learning_rate
        else:
            ids = _first_tokens(model, restarts, n_tokens, draw).to(E.device)
            free, rate = E[ids].clone().requires_grad_(), learning_rate * float(E.square().mean().sqrt())
        torch_optimiser = getattr(torch.optim, optimiser)([free], lr=rate)
        if constant is None and objective == "constant":
            judge = judge.beyond(free.detach() @ E if prior == "softmax" else free.detach())
        walk = Walk(judge, space, prior, prior_weight, free, torch_optimiser)
        arguments: dict[str, Any] = {
            "selection": hashed(judge.selected),
            "n_tokens": n_tokens,
            "objective": objective,
            "target": None if judge.target is None else hashed(judge.target),
            "constant": judge.constant if objective == "constant" else None,
            "prior": prior,
            "prior_weight": prior_weight if prior in PENALTIES else None,
            "optimiser": optimiser,
            "learning_rate": learning_rate,
            "steps": steps,
            "patience": patience,
            "restarts": restarts,
            "seed": seed,
            "isolated": isolated,
        }
        with Checkpoint(
            resume,
            "search",
            lambda: sought.fingerprint | arguments,
            owner="a gradient search",
            names=TENSORS,
        ) as saved:
            _run(walk, saved, steps, patience, progress)
        decoded = walk.end()
        selected = {way: judge.of_tokens(each.ids, walk.rows) for way, each in walk.decoded.items()}
        found = walk.embedded(walk.best)
    return GradientSearch(
        **{name: value for name, value in sought.fields().items() if name != "features"},
        layer=sought.layers[0],
        selected=judge.selected,
        objective=objective,
        target_ids=judge.target,
        constant=judge.constant if objective == "constant" else None,
        prior=prior,
        prior_weight=prior_weight if prior in PENALTIES else None,
        optimiser=optimiser,
        learning_rate=learning_rate,
        isolated=isolated,
        seed=seed,
        objectives=torch.stack(walk.objectives, dim=1),
        activations=torch.stack(walk.activations, dim=1),
        embeddings=found.cpu().clone(),
        nearest_cosine=space.cosines(found).amax(-1).cpu(),
        token_cosine=space.between_tokens(),
        decoded_ids=decoded,
        ids={way: each.ids for way, each in walk.decoded.items()},
        true_objectives={way: each.objective for way, each in walk.decoded.items()},
        true_activations={way: each.activation for way, each in walk.decoded.items()},
        selected_activations=selected,
        optimum=optimum,
        strings=sought.strings(
            *decoded.values(),
            *(each.ids for each in walk.decoded.values()),
            *([] if judge.target is None else [judge.target]),
        ),
    )


def _run(walk: Walk, saved: Checkpoint, steps: int, patience: int, progress: bool | None) -> None:
    """Make the steps that the checkpoint has not made yet."""
    if saved.tensors:
        walk.restore(saved.tensors)
    else:
        walk.begin()
    # a step changes tensors in place, so what is saved is a copy from before it
    whole = saved.tensors

    def made() -> Iterator[None]:
        nonlocal whole
        while walk.steps < steps and walk.stalled < patience:
            walk.step()
            if saved.path is not None:
                whole = walk.tensors()
            yield

    for _ in saved.loop(
        made(),
        lambda: (whole, whole["objectives"].shape[1] if whole else 0),
        total=steps,
        desc="searching",
        unit="step",
        progress=progress,
    ):
        pass


def _first_tokens(
    model: LensModel, restarts: int, n_tokens: int, draw: torch.Generator
) -> Int[Tensor, "restart pos"]:
    """Random tokens, but for the first restarts, which are of one special token each."""
    drawable = drawable_tokens(model.tokenizer, model.cfg.d_vocab)
    ids = drawable[torch.randint(len(drawable), (restarts, n_tokens), generator=draw)]
    n_named = model.cfg.d_vocab if model.tokenizer is None else min(len(model.tokenizer), model.cfg.d_vocab)
    named = torch.arange(n_named)
    special = named[~torch.isin(named, drawable)][: restarts // 2]
    ids[: len(special)] = special[:, None]
    return ids


def _optimum(complete: CompleteSearch, sought: Sought, judge: Judge, n_tokens: int) -> float:
    """The activation that the complete search found."""
    if judge.objective not in ("constant", "maximise"):
        raise ValueError(
            f"a complete search has the largest activation, which the objective {judge.objective!r} does not "
            "look for: leave it out"
        )
    if n_tokens != 1 or len(judge.selected) != 1:
        raise ValueError(
            "a complete search is of one token and one feature, but here are "
            f"{n_tokens} tokens and {len(judge.selected)} selected elements: leave it out"
        )
    if judge.alone is not None:
        raise ValueError("a complete search is of the whole model: leave it out, or use isolated=False")
    feature, layer = int(judge.selected[0, 1]), sought.layers[0]
    same_directions = complete.directions is None or (
        sought.directions is not None and torch.equal(complete.directions, sought.directions)
    )
    for what, same in (
        ("model", complete.model == sought.info),
        ("site", complete.site == sought.site),
        ("directions", same_directions),
        ("prefix", torch.equal(complete.prefix, sought.prefix)),
        ("layer", layer in complete.layers),
        ("feature", feature in complete.features),
    ):
        if not same:
            raise ValueError(f"the complete search is not of the same {what}: leave it out, or repeat it")
    at = complete.layers.index(layer), complete.features.index(feature)
    claimed, own = float(complete.activations[at][0]), float(judge.of_tokens(complete.ids[at][:1, None], 1))
    # other shapes sum in another order; by the feature's own range, since some are far larger than others
    tolerance = 1e-3 if judge.embeddings.dtype in (torch.float32, torch.float64) else 0.1
    ends = torch.stack([complete.activations[at[0]], complete.lowest_activations[at[0]]]).abs()
    if not abs(own - claimed) <= tolerance * float(ends[:, at[1]].amax() + 0.01 * ends.amax()):
        raise ValueError(
            f"the complete search is of other weights: its best token has an activation of {claimed:.6g} "
            f"there, but {own:.6g} here: repeat it"
        )
    return claimed
