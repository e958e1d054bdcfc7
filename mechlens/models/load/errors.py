"""The one error of loading, so that a caller can tell it from a mistake in our own code."""

from __future__ import annotations


class ModelLoadError(ValueError):
    """A model cannot be had as asked; the message says what came, what was needed and what to do."""
