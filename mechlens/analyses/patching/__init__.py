"""Patching and ablation: how much a prediction depends on one activation."""

from __future__ import annotations

from mechlens.analyses.patching.ablations import ablate_heads, ablate_mlps
from mechlens.analyses.patching.experiment import Patching
from mechlens.analyses.patching.metrics import KL, LogitDiff, LogitFunction, LogProb, Loss, Metric
from mechlens.analyses.patching.sources import Earlier, Edges, Mean, NextEmbedding, Resampled, Source, Zero

__all__ = [
    "KL",
    "Earlier",
    "Edges",
    "LogProb",
    "LogitDiff",
    "LogitFunction",
    "Loss",
    "Mean",
    "Metric",
    "NextEmbedding",
    "Patching",
    "Resampled",
    "Source",
    "Zero",
    "ablate_heads",
    "ablate_mlps",
]
