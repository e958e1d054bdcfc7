"""Features: what input excites one element of an activation."""

from __future__ import annotations

from mechlens.analyses.features.complete import search_complete

__all__ = ["search_complete"]
