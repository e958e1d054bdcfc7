"""The study `feature-search`: the searches of "Language Model Features", with controls.

A feature here is a basis dimension of the residual stream. Badger looks at four features by eye. The study
counts over many, and compares the trained model with chance, with random weights, and with random blocks on
the trained embeddings, to separate what training, the residual stream and the embedding contribute.

References: Badger, "Language Model Features". Tokens are compared with its tables on GPT-2 small and medium,
ignoring spaces, which are lost in print.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechlens.analyses.features import (
    Features,
    Maximize,
    Optimizer,
    Prior,
    feature_alignment,
    search_exhaustive,
    search_gradient,
    search_greedy,
)
from mechlens.arguments import check_counts, generator_of
from mechlens.errors import ArgumentError
from mechlens.models.protocol import LensModel
from mechlens.models.run.forward import watch
from mechlens.models.weights.randomize import random_like
from mechlens.progress import progress_bar
from mechlens.results import ExhaustiveSearch, FeatureAlignment, GradientSearch, GreedySearch, Result
from mechlens.show.feature_alignment import feature_alignment_section
from mechlens.show.features import exhaustive_search_section, greedy_search_section
from mechlens.show.gradient_search import gradient_search_section
from mechlens.show.section import Section
from mechlens.studies.claims import Study
from mechlens.studies.published import FEATURE_TOKENS, PublishedTokens
from mechlens.text.tokens import vocabulary_hash

if TYPE_CHECKING:
    import pandas as pd

FOUR = (0, 1, 2, 3)
"""The features that Badger shows."""
REPEATED = 5
"""Tokens of an input that is maximized at every position, as in Badger."""
OTHERS = 256
"""Random tokens that the last token of a greedy input is compared with."""
DRAWN = 4
"""Gradient searches that a report shows."""
WITHIN = {"trained": "trained", "random": "random weights", "embeddings": "random blocks, trained embeddings"}
"""Alignments of the layers of one model, in words."""
BETWEEN = {
    "trained_random": "trained and random weights",
    "trained_embeddings": "trained and random blocks on its embeddings",
    "trained_other": "the model and the one of another size",
}
"""Alignments of two models; the last only if another model was given."""


@dataclasses.dataclass(frozen=True)
class FeatureSearchStudy(Study):
    """The searches on one model and on its controls, and how well they agree."""

    complete: Mapping[str, ExhaustiveSearch]
    """Of the `trained` model, with `random` weights, and with random blocks on the trained `embeddings`."""
    alignments: Mapping[str, FeatureAlignment]
    """By the names of `WITHIN` and `BETWEEN`."""
    greedy: tuple[GreedySearch, ...]
    """Of some layers, features 0 to 3."""
    summed: tuple[bool, ...]
    """For each of these inputs, whether its last token is the best by its own activation as well as by the
    sum over all positions, in full forward passes."""
    gradient: tuple[GradientSearch, ...]
    """One-token inputs for some features of the first layer, with the default settings."""
    descents: Mapping[str, tuple[GradientSearch, ...]]
    """The same from a single random start, as in Badger, on each of the three models. Models with random
    weights start elsewhere, because a shared start could make them agree."""
    repeated: tuple[GradientSearch, ...]
    """Several tokens from a single random start; the feature is summed over all positions."""
    alone: tuple[GradientSearch, ...]
    """One-token inputs for some features of the last layer's block, without the earlier blocks."""
    softmax: Mapping[int, tuple[GradientSearch, ...]]
    """With Badger's prior, by layer, if Badger used it on the model."""

    @property
    def results(self) -> dict[str, Result]:
        greedy = {f"greedy_layer_{each.layer}": each for each in self.greedy}
        # the first of many alike; `to_features` has all
        return super().results | greedy | {"gradient": self.gradient[0]}

    def to_features(self) -> pd.DataFrame:
        """One row per feature of the first layer that was searched by gradients: feature, best_token, optimum
        (of all tokens), gradient_token, gradient_activation, share_of_optimum, descent_token (from one start,
        decoded at its end), cosine (of that embedding to the nearest real one)."""
        import pandas as pd

        whole, rows = self.complete["trained"], []
        for search, descent in zip(self.gradient, self.descents["trained"], strict=True):
            feature = int(search.selected[0, 1])
            at = whole.layers.index(search.layer), whole.features.index(feature)
            best, optimum = int(whole.ids[at][0]), float(whole.activations[at][0])
            activation = search.best_activation()
            rows.append(
                (
                    feature,
                    whole.strings[str(best)],
                    optimum,
                    search.strings[str(int(search.best_ids()[0]))],
                    activation,
                    share_of(activation, optimum),
                    descent.strings[str(decoded(descent)[0])],
                    float(descent.nearest_cosine[0].mean()),
                )
            )
        columns = ["feature", "best_token", "optimum", "gradient_token", "gradient_activation"]
        columns += ["share_of_optimum", "descent_token", "cosine"]
        return pd.DataFrame(rows, columns=columns)

    def sections(self) -> list[Section]:
        between = {name: words for name, words in BETWEEN.items() if name in self.alignments}
        return [
            exhaustive_search_section(self.complete["trained"]),
            *(
                feature_alignment_section(
                    [self.alignments[name] for name in names], names=list(names.values()), title=title
                )
                for names, title in (
                    (WITHIN, "Do layers share their maximally activating tokens?"),
                    (between, "Do other models have the same features?"),
                )
            ),
            greedy_search_section(self.greedy),
            gradient_search_section(self.gradient[:DRAWN]),
            gradient_search_section(self.repeated[:DRAWN], title="Several positions at once"),
        ]


def study_feature_search(
    raw: LensModel,
    *,
    n_features: int = 32,
    n_tokens: int = 4,
    top_k: int = 5,
    against: LensModel | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> FeatureSearchStudy:
    """Search features as Badger does, in the model and in its controls; `feature_claims` has the claims.

    Args:
        raw: a model with unprocessed weights.
        n_features: number of features to search by gradients, from feature 0 on.
        n_tokens: tokens of greedy searches.
        top_k: maximally activating tokens to keep, for the overlap.
        against: a model of another size with the same tokenizer and unprocessed weights; the layers and
            features that both have are compared.
        seed: of random weights and starts.

    Raises:
        ValueError: as the searches and `feature_alignment`; a size below 1.

    Cost: three exhaustive searches; greedy searches of four features in at most four layers; about two
    gradient searches and four from a single start for each feature.
    """
    check_counts(n_features=n_features)
    if n_tokens > raw.cfg.n_ctx:
        raise ArgumentError("n_tokens", f"at most {raw.cfg.n_ctx}, the model's context", n_tokens)
    if against is not None and vocabulary_hash(raw.tokenizer) != vocabulary_hash(against.tokenizer):
        raise ValueError(
            "against must be a model with the same tokenizer: the ids of this one mean other tokens"
        )
    last = raw.cfg.n_layers - 1
    four = [feature for feature in FOUR if feature < raw.cfg.d_model]
    search = functools.partial(search_exhaustive, top_k=top_k, progress=progress)
    complete = {"trained": search(raw)}
    trained = complete["trained"]
    alignments: dict[str, FeatureAlignment] = {}
    if against is not None:
        alignments["trained_other"] = feature_alignment(trained, search(against))
    features = trained.features[:n_features]
    few = features[: len(FOUR)]
    layers = some_layers(trained)
    own = tables_of(trained)
    softmax = sorted({each.block - 1 for each in own if each.search == "softmax"} & set(trained.layers))
    steps = progress_bar(
        total=len(layers) + 6 * len(features) + len(softmax) * len(few),
        desc="features",
        unit="search",
        progress=progress,
    )

    def for_each(work: Callable[..., Any], values: Sequence[int], **options: Any) -> tuple[Any, ...]:
        found = []
        for value in values:
            found.append(work(value, **options))
            steps.update()
        return tuple(found)

    def gradient(
        feature: int,
        *,
        layer: int,
        of: LensModel = raw,
        n_tokens: int = 1,
        seed: int = seed,
        restarts: int = 64,
        prior: Prior | None = None,
        **options: Any,
    ) -> GradientSearch:
        return search_gradient(
            of,
            Maximize(Features(layer, feature), **options),
            n_tokens=n_tokens,
            optimizer=Optimizer(restarts=restarts),
            prior=prior,
            seed=seed,
        )

    descend = functools.partial(for_each, gradient, features, layer=0, restarts=1)
    descents = {"trained": descend(optimum=trained)}
    for name in ("random", "embeddings"):
        # one after the other, because each is a whole model
        other = random_like(raw, seed, keep_embeddings=name == "embeddings")
        complete[name] = search(other)
        descents[name] = descend(of=other, seed=seed + 1)
        alignments[f"trained_{name}"] = feature_alignment(trained, complete[name])
        del other
    alignments |= {name: feature_alignment(each) for name, each in complete.items()}
    greedy = for_each(
        lambda layer: search_greedy(raw, Features(layer, four), n_tokens=n_tokens, progress=progress), layers
    )
    found = FeatureSearchStudy(
        comparisons=(),
        complete=complete,
        alignments=alignments,
        greedy=greedy,
        summed=tuple(same for each in greedy for same in _sums_agree(raw, each, seed)),
        gradient=for_each(gradient, features, layer=0, optimum=trained),
        descents=descents,
        repeated=for_each(gradient, features, layer=0, n_tokens=REPEATED, restarts=1),
        alone=for_each(gradient, features, layer=last, isolated=True),
        softmax={layer: for_each(gradient, few, layer=layer, prior=Prior("softmax")) for layer in softmax},
    )
    steps.close()
    return found


def tables_of(search: ExhaustiveSearch) -> list[PublishedTokens]:
    """Badger's tables on this model."""
    name, n_layers = search.model.name, search.model.n_layers
    return [each for each in FEATURE_TOKENS if name in each.models and n_layers == each.n_layers]


def _sums_agree(model: LensModel, search: GreedySearch, seed: int) -> list[bool]:
    """For each feature's input, whether its last token is the best there by its own activation and by the
    sum, in full forward passes of it and of other tokens, as in Badger's two loops."""
    draw = generator_of(seed)
    others = torch.randperm(model.cfg.d_vocab, generator=draw)[:OTHERS]
    agree = []
    for feature, ids in zip(search.features, search.ids[:, 0], strict=True):
        last = torch.cat([ids[-1:], others[others != ids[-1]]])
        inputs = torch.cat([ids[:-1].expand(len(last), -1), last[:, None]], dim=1)
        kept: list[Tensor] = []
        name = f"blocks.{search.layer}.hook_resid_post"
        watch(model, inputs, {name: kept.append})
        own = kept[0][..., feature].float()
        # the first row is the input that was found
        agree.append(int(own[:, -1].argmax()) == int(own.sum(1).argmax()) == 0)
    return agree


def some_layers(search: ExhaustiveSearch) -> list[int]:
    """All layers of a shallow model; for a deeper one the first, those at one and two thirds, and the last,
    as in Badger."""
    n = len(search.layers)
    if n <= 4:
        return list(search.layers)
    return [search.layers[max(0, round(n * share) - 1)] for share in (0, 1 / 3, 2 / 3, 1)]


def decoded(search: GradientSearch) -> list[int]:
    """The tokens that the first restart's embeddings decode to by the pseudo-inverse, as in Badger."""
    return list(search.decoded_ids["pinv"][0].tolist())


def share_of(activation: float, optimum: float) -> float:
    """The share of an optimum that was reached; nan unless the optimum is positive."""
    return activation / optimum if optimum > 0 else float("nan")
