"""The errors that callers may want to catch. Importing this module imports nothing heavy."""

from __future__ import annotations

from typing import Any


class ArgumentError(ValueError):
    """An argument has an invalid value.

    The message names the argument, what it must be, and what was passed. On the command line it names the
    option instead.

    Args:
        name: the argument's name, such as `top_k`.
        needs: what the argument must be, such as `at least 1`.
        got: the value that was passed.
        hint: what to do, or why the value is invalid.

    Example:
        >>> raise mechlens.ArgumentError("top_k", "at least 1", 0)
        Traceback (most recent call last):
        mechlens.errors.ArgumentError: top_k must be at least 1, got 0
    """

    def __init__(self, name: str, needs: str, got: Any, hint: str = "") -> None:
        self.name, self.needs, self.got, self.hint = name, needs, got, hint
        super().__init__(self.said_of(name))

    def said_of(self, name: str) -> str:
        """The message, with another name for the argument."""
        return f"{name} must be {self.needs}, got {self.got!r}{f': {self.hint}' if self.hint else ''}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.needs, self.got, self.hint)


class ModelLoadError(ValueError):
    """A model cannot be loaded. The message explains why and what to do.

    Example:
        >>> try:
        ...     mechlens.load_model("./my-model")
        ... except mechlens.ModelLoadError as error:
        ...     print(error)
        my-model does not exist: give a directory with config.json, weights and tokenizer
    """
