"""Shared by several tests: optional models outside the repository, the installed engine, and its warnings."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from mechlens.models.load import hub

ENGINE_IS_TOLD = "ignore:TransformerLens 4 has no HookedTransformer"
"""For `PYTHONWARNINGS` of processes on the bridge whose standard error is checked."""
SHARED = Path(os.environ.get("MECHLENS_SHARED", Path(__file__).parents[2] / "shared"))
STORIES = SHARED / "models" / "stories260K"

needs_shared = pytest.mark.skipif(
    not STORIES.is_dir(),
    reason="the trained Llama model is not next to this checkout: set MECHLENS_SHARED to its folder",
)

SMOLLM2 = "smollm2-135m"
HAS_SMOLLM2 = hub.PACKAGED[SMOLLM2].find() is not None
needs_smollm2 = pytest.mark.skipif(not HAS_SMOLLM2, reason=f"needs the {SMOLLM2} package: make real-model")

HAS_HOOKED = int(importlib.metadata.version("transformer-lens").split(".")[0]) < 4
BACKENDS = ["hooked", "bridge"] if HAS_HOOKED else ["bridge"]
