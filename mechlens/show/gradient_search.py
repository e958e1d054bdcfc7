"""The section on gradient searches."""

from __future__ import annotations

from collections.abc import Sequence

from mechlens.results import GradientSearch
from mechlens.results.gradient_search import ACTIVATING
from mechlens.show.features import differing, feature_terms, some
from mechlens.show.section import Figure, Section, Table, drawn, joined
from mechlens.text.display import count, number

_TERMS = {
    "Gradient search": (
        "Gradient descent changes embeddings until they activate the feature. They are decoded to tokens, "
        "which are then run."
    ),
    "Activation": (
        "The mean over all selected elements when the tokens are run. Embeddings that belong to no token may "
        "exceed it."
    ),
    "Optimum": "The largest activation of all single tokens, from an exhaustive search.",
    "Objective": (
        "What the search minimized, when the tokens are run: the distance to the target, or the negative "
        "log-probability of the continuation in nats."
    ),
    "Nearest cosine": "Cosine similarity of the embedding to the nearest real one, mean over positions.",
    "Prior": (
        "Keeps the embeddings close to real ones. Softmax: they are mixtures of real ones. Norm: a penalty "
        "for an unusual norm. Nearest: a penalty for the distance to the nearest real one."
    ),
}


def gradient_search_section(
    results: Sequence[GradientSearch], *, title: str = "Gradient search", text: str = ""
) -> Section:
    """What each search found and how far it is from the optimum; the steps of the first as a figure.

    Args:
        results: searches that differ in feature or otherwise.

    Raises:
        ValueError: no results.
    """
    first = some(results, "search_gradient")
    varying = differing(
        results,
        {
            "model": lambda each: each.model.name,
            # a continuation reads no layer
            "layer": lambda each: "" if each.objective == "continuation" else each.layer,
            "searched": lambda each: each.searched,
            "begins": lambda each: each.begins,
            "objective": lambda each: each.objective,
            "prior": lambda each: each.prior,
            "optimizer": lambda each: each.optimizer,
            "block alone": lambda each: "yes" if each.isolated else "no",
        },
    )
    left_out = {"restart"}
    if all(each.objective == "continuation" for each in results):
        left_out.add("activation")
    if all(each.objective in ACTIVATING for each in results):
        # it equals the activation
        left_out.add("objective")
    if not any(len(each.selected) > 1 and each.objective in ACTIVATING for each in results):
        left_out.add("smallest_activation")
    columns = [each for each in first.columns if each.name not in left_out]
    has_optimum = any(each.optimum is not None for each in results)
    rows = [
        [*(values[at] for values in varying.values()), *row, *([result.optimum] if has_optimum else [])]
        for at, result in enumerate(results)
        for row in result.summary()[[each.name for each in columns]].to_numpy().tolist()
    ]
    best = first.text(first.best_ids(), " ")
    steps = first.objectives.shape[1] - 1
    weight = "" if first.prior_weight is None else f" x {first.prior_weight:g}"
    said = (
        f"{first.title}, {first.begins}: {count(len(first.embeddings), 'restart')} of "
        f"{count(first.embeddings.shape[1], 'token')}, {count(steps, 'step')} of {first.optimizer}"
        + (f", prior {first.prior}{weight}" if first.prior != "none" else "")
        + f". {first.verdict if len(results) == 1 else ''} The mean cosine similarity of the embeddings "
        f"to the nearest real one is {number(float(first.nearest_cosine.mean()))}; between a real embedding "
        f"and its nearest neighbor it is {number(first.token_cosine)}."
    )
    return Section(
        title,
        joined(text, " ".join(said.split())),
        [
            Table(
                [*varying, *columns, *(["optimum"] if has_optimum else [])],
                rows,
                "The best tokens by each decoding",
            ),
            Figure(
                drawn("plot_gradient_search", first),
                "Each line is a restart; the bold one found the best tokens. Marks on the right are the "
                "decoded tokens, when run."
                + (" Dashed: the largest activation of all tokens." if first.optimum is not None else ""),
                f"Values at each step of the gradient search for {first.searched}. Best tokens: {best}.",
            ),
        ],
        feature_terms(first.noun) | _TERMS,
    )


SECTIONS = {GradientSearch: lambda result, **options: gradient_search_section([result], **options)}
