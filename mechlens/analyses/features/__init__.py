"""Features: what input excites one element of an activation."""

from __future__ import annotations

from mechlens.analyses.features.alignment import feature_alignment
from mechlens.analyses.features.examples import feature_examples
from mechlens.analyses.features.exhaustive import search_complete
from mechlens.analyses.features.gradient import search_gradient
from mechlens.analyses.features.greedy import search_greedy

__all__ = [
    "feature_alignment",
    "feature_examples",
    "search_complete",
    "search_gradient",
    "search_greedy",
]
