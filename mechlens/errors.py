"""The errors that callers may want to catch. Light to import."""

from __future__ import annotations

from typing import Any


class ArgumentError(ValueError):
    """An argument has a value that it cannot have.

    The command line says the same of its own option.

    Example:
        >>> raise mechlens.ArgumentError("top_k", "at least 1", 0)
        Traceback (most recent call last):
        mechlens.errors.ArgumentError: top_k must be at least 1, got 0
    """

    def __init__(self, name: str, needs: str, got: Any, hint: str = "") -> None:
        self.name, self.needs, self.got, self.hint = name, needs, got, hint
        super().__init__(self.said_of(name))

    def said_of(self, name: str) -> str:
        """The message, with the argument under another name."""
        return f"{name} must be {self.needs}, got {self.got!r}{f': {self.hint}' if self.hint else ''}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.needs, self.got, self.hint)


class ModelLoadError(ValueError):
    """A model cannot be had as asked; the message says what came, what was needed and what to do."""
