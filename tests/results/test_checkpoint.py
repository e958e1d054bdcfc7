"""Checkpoints of long computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mechlens
from mechlens.results import checkpoint
from mechlens.results.checkpoint import Checkpoint
from tests.checked import unchecked

MODEL = {"n_layers": 2}


def squares(path, n=5, stop=None, *, arguments=None):
    """Square the numbers below n one by one, with a checkpoint; interrupted before `stop`."""
    made = []
    with Checkpoint(
        path, "search", lambda: {"model": MODEL, "n": n} | (arguments or {}), owner="a sum", names=["done"]
    ) as saved:
        done = saved.tensors.get("done", torch.zeros(n))
        for i in saved.loop(
            range(saved.step, n),
            lambda: ({"done": done}, saved.step + len(made)),
            desc="squares",
            unit="number",
            total=n,
            progress=False,
        ):
            if i == stop:
                raise KeyboardInterrupt
            done[i] = i**2
            made.append(i)
    return done, made


def test_work_without_a_path_is_done_completely():
    done, made = squares(None)
    assert (done.tolist(), made) == ([0, 1, 4, 9, 16], [0, 1, 2, 3, 4])


def test_interrupted_work_resumes_after_its_last_step(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        squares(file, stop=3)
    assert load_file(file)["done"].tolist() == [0, 1, 4, 0, 0]
    done, made = squares(file)
    assert (done.tolist(), made) == ([0, 1, 4, 9, 16], [3, 4])
    assert squares(file)[1] == []


def test_progress_is_saved_every_save_seconds(tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(checkpoint, "save_state", lambda *_, step: saves.append(step))
    squares(tmp_path / "checkpoint.safetensors")
    assert saves == [5]
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", -1.0)
    squares(tmp_path / "checkpoint.safetensors")
    assert saves == [5, 1, 2, 3, 4, 5, 5]


def test_numpy_numbers_are_numbers(tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    given = {"seed": np.int64(3), "rate": np.float32(0.1), "which": [np.int32(1), 2]}
    squares(file, arguments=given)
    squares(file, arguments={"seed": 3, "rate": float(np.float32(0.1)), "which": [1, 2]})
    with pytest.raises(ValueError, match="begun with seed 3, not "):
        squares(file, arguments=given | {"seed": np.int64(5)})
    with pytest.raises(TypeError, match="only tensors, numbers and texts can be saved, got a set"):
        squares(tmp_path / "other.safetensors", arguments={"which": {1}})


def test_searches_take_numpy_numbers(tmp_path, tiny_directories):
    """As in notebooks; without the tests' type checks, which refuse some."""
    model = mechlens.load_model(tiny_directories / "gpt2", processing=False)
    features = mechlens.Features(0, 3)
    file = tmp_path / "checkpoint.safetensors"
    with unchecked():
        few = mechlens.Optimizer(learning_rate=0.1, steps=3, restarts=4)
        asked = {"n_tokens": np.int64(1), "optimizer": few, "seed": np.int64(3), "resume": file}
        found = [mechlens.search_gradient(model, mechlens.Maximize(features), **asked) for _ in range(2)]
        best = mechlens.search_exhaustive(model, mechlens.Features(range(2), range(4)), top_k=np.int64(2))
    assert found[0] == found[1]
    for each in (found[0], best):
        assert mechlens.load(each.save(tmp_path / "result.safetensors")) == each
