"""Patching and ablation: what a run's prediction owes to one of its activations."""

from __future__ import annotations

from mechlens.analyses.patching.ablations import ablate_heads, ablate_mlps_from_first_half
from mechlens.analyses.patching.attribution import attribution_patching
from mechlens.analyses.patching.blocks import patch_blocks
from mechlens.analyses.patching.grid import patch_grid
from mechlens.analyses.patching.path import patch_path, path_attention
from mechlens.analyses.patching.sources import Corrupted, Earlier, Edges, Mean, NextEmbedding, Resampled

__all__ = [
    "Corrupted",
    "Earlier",
    "Edges",
    "Mean",
    "NextEmbedding",
    "Resampled",
    "ablate_heads",
    "ablate_mlps_from_first_half",
    "attribution_patching",
    "patch_blocks",
    "patch_grid",
    "patch_path",
    "path_attention",
]
