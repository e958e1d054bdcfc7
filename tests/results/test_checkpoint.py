"""The state of work that is interrupted."""

from __future__ import annotations

import contextlib

import jaxtyping
import numpy as np
import pytest
import torch

import mechlens
from mechlens.results.checkpoint import load_state, save_state


def test_numbers_of_numpy_are_numbers(tmp_path):
    file, tensors = tmp_path / "state.safetensors", {"found": torch.tensor([1.5, 2.5])}
    rest = {"model": {"n_layers": 2}, "text": "a"}
    arguments = rest | {"seed": np.int64(3), "rate": np.float32(0.1), "which": [np.int32(1), 2]}
    save_state(file, "search", tensors, arguments, step=4)
    plain = rest | {"seed": 3, "rate": float(np.float32(0.1)), "which": [1, 2]}
    for given in (arguments, plain):
        read, step = load_state(file, "search", "a search", ["found"], given)
        assert torch.equal(read["found"], tensors["found"])
        assert step == 4
    with pytest.raises(ValueError, match="begun with seed 3, not "):
        load_state(file, "search", "a search", ["found"], arguments | {"seed": np.int64(5)})
    with pytest.raises(TypeError, match="tensors, numbers and texts, but here is a set"):
        save_state(file, "search", tensors, rest | {"which": {1}}, step=0)


def test_searches_take_numbers_of_numpy(tmp_path, tiny_directories):
    """As a notebook has them; without the tests' checks of types, which refuse some."""
    model = mechlens.load_model(tiny_directories / "gpt2", processing=False)
    asked = {"layer": np.int64(0), "selection": np.s_[:, 3], "n_tokens": np.int64(1), "steps": np.int64(3)}
    asked |= {"restarts": np.int64(4), "seed": np.int64(3), "learning_rate": np.float32(0.1)}
    asked["state"] = tmp_path / "state.safetensors"
    with unchecked():
        found = [mechlens.search_gradient(model, **asked) for _ in range(2)]
        best = mechlens.search_complete(model, layers=np.arange(2), features=np.arange(4), top_k=np.int64(2))
    assert found[0] == found[1]
    for each in (found[0], best):
        assert mechlens.load(each.save(tmp_path / "result.safetensors")) == each


@contextlib.contextmanager
def unchecked():
    """What users run: without the checks of every signature that conftest.py puts in."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
