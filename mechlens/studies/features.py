"""The study `features`: whether layers share the maximally activating tokens of their residual dimensions.

A feature here is a basis dimension of the residual stream.

References: Badger, "Language Model Features".
"""

from __future__ import annotations

import dataclasses

import torch

from mechlens.analyses.features import Features, feature_alignment, search_exhaustive
from mechlens.models.protocol import LensModel
from mechlens.models.weights.randomize import random_like
from mechlens.results import ExhaustiveSearch, FeatureAlignment
from mechlens.show.feature_alignment import feature_alignment_section
from mechlens.show.features import exhaustive_search_section
from mechlens.show.section import Section
from mechlens.studies.claims import Measured, Study

N_LAYERS, N_FEATURES = 8, 576
"""Maximum numbers of layers and features to compare."""


@dataclasses.dataclass(frozen=True)
class FeaturesStudy(Study):
    """The maximally activating tokens of some features, and how often layers agree on them."""

    features: ExhaustiveSearch
    features_trained: FeatureAlignment
    features_random: FeatureAlignment
    """The same with random weights."""

    def quantities(self) -> dict[str, Measured]:
        trained, random = self.features_trained.share(), self.features_random.share()
        words = "share of features whose maximally activating token is the same in two layers"
        # rounding decides between tokens with equal activations, and each engine draws its own random weights
        return {
            "trained": Measured(trained.value, f"{words}, mean over pairs of layers", 0.02),
            "random": Measured(random.value, f"{words}, with random weights", 0.05),
            "chance": Measured(trained.chance, f"{words}, by chance", 0.005),
            "more than random": Measured(
                "yes" if trained.low > random.high else "no",
                "layers agree more often than with random weights",
            ),
        }

    def sections(self) -> list[Section]:
        both = [self.features_trained, self.features_random]
        return [
            exhaustive_search_section(self.features),
            feature_alignment_section(both, names=["trained", "random weights"]),
        ]


def study_features(raw: LensModel, *, progress: bool | None = None) -> FeaturesStudy:
    """Search some features in evenly spaced layers, in the trained model and with random weights.

    Args:
        raw: a model with unprocessed weights.

    Cost: two exhaustive searches over the vocabulary.
    """
    n_layers = raw.cfg.n_layers
    spread = torch.linspace(0, n_layers - 1, min(N_LAYERS, n_layers), dtype=torch.float64)
    layers = sorted({round(x) for x in spread.tolist()})
    features = range(min(N_FEATURES, raw.cfg.d_model))

    def search(of: LensModel) -> ExhaustiveSearch:
        return search_exhaustive(of, Features(layers, features), top_k=5, progress=progress)

    found = search(raw)
    random = feature_alignment(search(random_like(raw, seed=0)))
    return FeaturesStudy((), found, feature_alignment(found), random)
