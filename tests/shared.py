"""What lies beside the repository while it is developed, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("MECHLENS_SHARED", Path(__file__).parents[2] / "shared"))
STORIES = SHARED / "models" / "stories260K"

needs_shared = pytest.mark.skipif(
    not STORIES.is_dir(),
    reason="the trained Llama model is not beside this checkout: set MECHLENS_SHARED to its folder",
)
