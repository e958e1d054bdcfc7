"""Examples in public docstrings run, and no public signature has more than nine parameters."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import mechlens
from tests.shared import HAS_SMOLLM2, SMOLLM2

WIDEST = 9
WITHOUT_EXAMPLE: set[str] = set()
"""Public functions without an example."""
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def methods(name: str, kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public methods that a class itself defines."""
    for attribute, value in vars(kind).items():
        function = getattr(value, "__func__", value)
        if not attribute.startswith("_") and inspect.isfunction(function):
            yield f"{name}.{attribute}", function


PUBLIC = {name: getattr(mechlens, name) for name in mechlens.__all__}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
METHODS = dict(each for name, kind in CLASSES.items() for each in methods(name, kind))
DOCUMENTED = {
    name: value
    for name, value in (PUBLIC | METHODS).items()
    if ">>>" in (getattr(value, "__doc__", None) or "")
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_example_runs(name, bundled, load_once, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "mechlens": mechlens,
        "torch": torch,
        "model": bundled,
        "raw": load_once("mechlens-books", processing=False),
        "tmp": tmp_path,
    }
    if "smollm2" in DOCUMENTED[name].__doc__ and not HAS_SMOLLM2:
        pytest.skip(f"the example needs {SMOLLM2}")
    told: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    example = doctest.DocTestParser().get_doctest(DOCUMENTED[name].__doc__, names, name, None, None)
    runner.run(example, out=told.append)
    assert not runner.failures, "".join(told)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_has_an_example(name):
    assert (name in DOCUMENTED) != (name in WITHOUT_EXAMPLE)


@pytest.mark.parametrize("name", FUNCTIONS | METHODS)
def test_a_public_signature_has_at_most_nine_parameters(name):
    found = [each for each in inspect.signature((FUNCTIONS | METHODS)[name]).parameters if each != "self"]
    assert len(found) <= WIDEST, found


def test_arguments_are_documented_in_place():
    """A pointer to another function would leave `help()` incomplete."""
    found = [
        name
        for name, value in (PUBLIC | METHODS).items()
        if "other arguments are" in (getattr(value, "__doc__", None) or "")
    ]
    assert not found
