"""Features: which inputs activate a basis dimension of an activation, or a direction."""

from __future__ import annotations

from mechlens.analyses.features.alignment import feature_alignment
from mechlens.analyses.features.examples import feature_examples
from mechlens.analyses.features.exhaustive import search_exhaustive
from mechlens.analyses.features.gradient import search_gradient
from mechlens.analyses.features.greedy import search_greedy
from mechlens.analyses.features.objectives import Continue, Match, Maximize
from mechlens.analyses.features.optimization import Optimizer, Prior
from mechlens.analyses.features.spec import Features, Prefix

__all__ = [
    "Continue",
    "Features",
    "Match",
    "Maximize",
    "Optimizer",
    "Prefix",
    "Prior",
    "feature_alignment",
    "feature_examples",
    "search_exhaustive",
    "search_gradient",
    "search_greedy",
]
