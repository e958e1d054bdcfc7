"""An interrupted patch grid resumes where it stopped."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from mechlens.analyses.patching import LogProb, Mean, Patching
from mechlens.models.load.loading import load_model
from mechlens.results import checkpoint
from tests.close import assert_close, assert_same

LENGTH = 6


def tokens_for(seed=0, rows=2):
    return torch.randint(4, 50, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


class Counted:
    """A metric that counts its calls and interrupts the grid after a number of them."""

    __name__ = "counted"

    def __init__(self, stop=None):
        self.stop, self.asked = stop, 0

    def __call__(self, logits):
        self.asked += 1
        if self.asked == self.stop:
            raise KeyboardInterrupt
        return logits.max()


OPTIONS = {"site": "mlp_out", "values": "zero", "positions": [1, 3]}
# 2 prompts, 2 layers, 2 positions; the metric is tested once, and read once for each clean run
CELLS = 8


@pytest.fixture
def resume(tmp_path):
    return tmp_path / "resume.safetensors"


def run(model, tokens=None, corrupted=None, metric=None, **options):
    """One cell at a time."""
    tokens = tokens_for() if tokens is None else tokens
    return Patching(model, tokens, corrupted, metric=metric, token_budget=1).grid(**(OPTIONS | options))


def test_a_grid_is_resumed_where_it_was_interrupted(tiny_bos_model, resume, tmp_path):
    whole = run(tiny_bos_model, metric=Counted())
    with pytest.raises(KeyboardInterrupt):
        # the test, the clean run and 4 cells of the first prompt, the clean run and a cell of the second
        run(tiny_bos_model, metric=Counted(stop=9), resume=resume)
    assert int(load_file(resume)["cells"].sum()) == 5
    rest = Counted()
    found = run(tiny_bos_model, metric=rest, resume=resume)
    assert rest.asked == 1 + 1 + (CELLS - 5), "nothing is measured twice but the clean run"
    # other rows in the batch change the order of sums
    assert torch.allclose(found.values, whole.values, atol=1e-5)
    assert_close(found.clean, whole.clean)
    again = Counted()
    assert_same(run(tiny_bos_model, metric=again, resume=resume), found)
    assert again.asked == 1, "nothing is left to do"
    assert list(tmp_path.glob(".*")) == []


def test_it_is_saved_along_the_way(tiny_bos_model, resume, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVE_SECONDS", 0)
    seen = []

    def peek(logits):
        seen.append(int(load_file(resume)["cells"].sum()) if resume.exists() else 0)
        return logits.max()

    run(tiny_bos_model, metric=peek, resume=resume)
    # before each of: the test, the clean runs (the second comes after 4 cells) and the cells
    assert seen == [0, 0, 0, 1, 2, 3, 4, 4, 5, 6, 7]
    assert int(load_file(resume)["cells"].sum()) == CELLS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "attn_out"}, "begun with site 'mlp_out', not 'attn_out': use the same"),
        ({"positions": [1]}, r"begun with positions \[1, 3\], not \[1\]"),
        ({"weight": 0.5}, "begun with weight 1.0, not 0.5"),
        ({"values": Mean(tokens_for(9))}, "source 'zero', not 'mean'"),
        ({"metric": LogProb(5, at=[1])}, "metric 'loss', not 'log_prob'"),
        ({"tokens": tokens_for(2)}, "begun with tokens '"),
        ({"corrupted": tokens_for(2)}, "begun with ids of corrupted '"),
    ],
)
def test_a_checkpoint_of_other_arguments_is_refused_by_name(tiny_bos_model, resume, change, message):
    run(tiny_bos_model, corrupted=tokens_for(1), resume=resume)
    with pytest.raises(ValueError, match=message):
        run(tiny_bos_model, **({"corrupted": tokens_for(1), "resume": resume} | change))


def test_other_weights_of_the_same_name_are_refused(tiny_directories, resume):
    model = load_model(tiny_directories / "gpt2")
    with pytest.raises(KeyboardInterrupt):
        run(model, tokens_for()[:1], metric=Counted(stop=5), resume=resume)
    with torch.no_grad():
        model.blocks[0].attn.W_O.mul_(2)
    with pytest.raises(ValueError, match="begun with other weights: the metric of its clean run"):
        run(model, tokens_for()[:1], metric=Counted(), resume=resume)


def test_resuming_needs_functions_with_a_name(tiny_bos_model, resume):
    with pytest.raises(ValueError, match="lambdas apart: define metric with `def`"):
        run(tiny_bos_model, metric=lambda x: x.max(), resume=resume)
    with pytest.raises(ValueError, match="define values with `def`"):
        run(tiny_bos_model, values=lambda activation, layer: activation, resume=resume)


def test_a_result_is_not_a_checkpoint_and_is_not_overwritten(tiny_bos_model, tmp_path):
    found = run(tiny_bos_model)
    saved = found.save(tmp_path / "grid.safetensors")
    with pytest.raises(ValueError, match="is not a checkpoint of a grid of patches"):
        run(tiny_bos_model, resume=saved)
    assert type(found).load(saved) == found
