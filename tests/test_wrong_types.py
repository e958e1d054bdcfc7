"""Every public function names, in one sentence, an argument that is not a model or result."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import mechlens

OTHERS: dict[str, Any] = {
    "against": " b",
    "batch": 1,
    "circuit": None,
    "corpus": ["some text"],
    "direction": "noising",
    "earlier": "L0H0",
    "feature": 0,
    "features": mechlens.Features(0),
    "head": "L0H0",
    "heads": "L0H0",
    "how": "skip",
    "input": "k",
    "k": 1,
    "kind": "k",
    "later": "L1H0",
    "layer": 0,
    "messages": "a message",
    "mlp": None,
    "n_tokens": 1,
    "previous": "L0H0",
    "objective": mechlens.Maximize(mechlens.Features(0)),
    "prompt": "a text",
    "receiver": "L1H0",
    "seed": 0,
    "sender": "L0H0",
    "seq_len": 4,
    "site": "z",
    "source": "zero",
    "text": "a text",
    "vector": torch.zeros(4),
}
"""Plausible values for further arguments without a default."""
FUNCTIONS = [
    (name, getattr(mechlens, name))
    for name in mechlens.__all__
    if inspect.isfunction(inspect.unwrap(getattr(mechlens, name)))
]


def first(function: Callable[..., Any]) -> inspect.Parameter | None:
    return next(iter(inspect.signature(function).parameters.values()), None)


def called(function: Callable[..., Any], value: Any, **given: Any) -> None:
    """Call a function with a value for its first argument and plausible values for the rest."""
    _, *rest = inspect.signature(function).parameters.values()
    needed = [
        each.name
        for each in rest
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    function(value, **{each: OTHERS[each] for each in needed if each not in given}, **given)


OF_MODELS = [
    (name, function)
    for name, function in FUNCTIONS
    if (parameter := first(function)) is not None and parameter.name == "model"
]
OF_RESULTS = [
    (name, function)
    for name, function in FUNCTIONS
    if (parameter := first(function)) is not None
    and parameter.name in ("result", "results", "lens", "patterns", "attn", "a", "circuit", "table")
]


def test_the_lists_match_the_signatures():
    """A renamed parameter would silently drop out of the lists."""
    models, of_results = ({name for name, _ in some} for some in (OF_MODELS, OF_RESULTS))
    plots = {name for name, _ in FUNCTIONS if name.startswith("plot_")}
    assert plots <= of_results
    annotated = {
        name for name, each in FUNCTIONS if "LensModel" in str(getattr(first(each), "annotation", ""))
    }
    assert annotated <= models
    assert len(models) > 35
    assert len(plots) > 20


OF_OBJECTS = [
    (name, parameter)
    for name, function in FUNCTIONS
    for parameter in inspect.signature(function).parameters
    if parameter in ("on", "training", "optimizer", "prior", "objective")
    or (name, parameter) in (("reproduce", "heads"), ("search_greedy", "features"))
    if (name, parameter) != ("score_heads", "on")  # which also takes text
]
"""Arguments that must be one of our objects, not text."""
VALUES = {"text": "heads", "none": None, "tensor": torch.zeros(0)}
CASES = [(name, "text") for name, _ in OF_MODELS] + [
    (name, value)
    for name, _ in OF_RESULTS
    for value in VALUES
    # these are eigenvalues
    if (name, value) != ("plot_eigenvalues", "tensor")
]


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    """The error of each call, in a process without the tests' type checks."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(ran.stdout)


@pytest.mark.parametrize(("name", "value"), CASES, ids=["-".join(case) for case in CASES])
def test_one_sentence_states_what_was_needed(told, name, value):
    models = name in dict(OF_MODELS)
    if models:
        wanted = r"model must be a HookedTransformer .* got str: load one with .*"
    else:
        wanted = rf"{first(dict(OF_RESULTS)[name]).name.removesuffix('s')}s? must be an? \w+.*, got .*"
    assert re.fullmatch(f"TypeError: {wanted}", told[f"{name}-{value}"]), told[f"{name}-{value}"]


@pytest.mark.parametrize(("name", "argument"), OF_OBJECTS)
def test_an_argument_that_is_not_one_of_our_objects_is_named(told, name, argument):
    wanted = rf"TypeError: {argument} must be an? [A-Z]\w+.*, got 'heads'"
    assert re.fullmatch(wanted, told[f"{name}-{argument}"]), told[f"{name}-{argument}"]


def main() -> None:
    told, functions = {}, dict(FUNCTIONS)
    model = mechlens.load_model(processing=False)
    for name, argument in OF_OBJECTS:
        try:
            called(functions[name], model, **{argument: "heads"})
        except Exception as error:
            told[f"{name}-{argument}"] = f"{type(error).__name__}: {error}"
    for name, value in CASES:
        try:
            called(functions[name], VALUES[value])
        except Exception as error:
            told[f"{name}-{value}"] = f"{type(error).__name__}: {error}"
    print(json.dumps(told))


if __name__ == "__main__":
    main()
