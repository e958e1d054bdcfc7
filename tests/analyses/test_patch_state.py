"""An interrupted sweep goes on where it stopped."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from mechlens.analyses.patching import Corrupted, Mean, grid, patch_grid
from mechlens.models.load.loading import load_model
from tests.close import assert_close, assert_same

LENGTH = 6


def tokens_for(seed=0, rows=2):
    return torch.randint(4, 50, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


class Counted:
    """A metric that counts how often it is asked, and stops the sweep after that."""

    __name__ = "counted"

    def __init__(self, stop=None):
        self.stop, self.asked = stop, 0

    def __call__(self, logits):
        self.asked += 1
        if self.asked == self.stop:
            raise KeyboardInterrupt
        return logits.max()


OPTIONS = {"site": "mlp_out", "source": "zero", "positions": [1, 3], "token_budget": 1}
# 2 prompts, 2 layers, 2 positions; a metric is tried once, and read once for each clean run
CELLS = 8


def test_a_sweep_goes_on_where_it_was_interrupted(tiny_bos_model, tmp_path):
    state = tmp_path / "state.safetensors"
    whole = patch_grid(tiny_bos_model, tokens_for(), metric=Counted(), **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        # the trial, the clean run and 4 cells of the first prompt, the clean run and a cell of the second
        patch_grid(tiny_bos_model, tokens_for(), metric=Counted(stop=9), state=state, **OPTIONS)
    assert int(load_file(state)["cells"].sum()) == 5
    rest = Counted()
    found = patch_grid(tiny_bos_model, tokens_for(), metric=rest, state=state, **OPTIONS)
    assert rest.asked == 1 + 1 + (CELLS - 5), "nothing is measured twice but the clean run"
    # other rows beside it, if any, sum in another order
    assert torch.allclose(found.values, whole.values, atol=1e-5)
    assert_close(found.clean, whole.clean)
    again = Counted()
    assert_same(patch_grid(tiny_bos_model, tokens_for(), metric=again, state=state, **OPTIONS), found)
    assert again.asked == 1, "nothing is left to do"
    assert list(tmp_path.glob(".*")) == []


def test_it_is_saved_on_the_way(tiny_bos_model, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "SAVE_SECONDS", 0)
    state, seen = tmp_path / "state.safetensors", []

    def peek(logits):
        seen.append(int(load_file(state)["cells"].sum()) if state.exists() else 0)
        return logits.max()

    patch_grid(tiny_bos_model, tokens_for(), metric=peek, state=state, **OPTIONS)
    # before each of: the trial, the clean runs (of which the second comes behind 4 cells) and the cells
    assert seen == [0, 0, 0, 1, 2, 3, 4, 4, 5, 6, 7]
    assert int(load_file(state)["cells"].sum()) == CELLS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "attn_out"}, "the sweep in .* was begun with site 'mlp_out', not 'attn_out': use the same"),
        ({"positions": [1]}, r"begun with positions \[1, 3\], not \[1\]"),
        ({"weight": 0.5}, "begun with weight 1.0, not 0.5"),
        ({"source": Mean(tokens_for(9))}, "source 'zero', not 'mean'"),
        ({"metric": "log_prob", "read": [1]}, "metric 'loss', not 'log_prob'"),
    ],
)
def test_other_arguments_are_refused_by_name(tiny_bos_model, tmp_path, change, message):
    state = tmp_path / "state.safetensors"
    patch_grid(tiny_bos_model, tokens_for(), state=state, **OPTIONS)
    with pytest.raises(ValueError, match=message):
        patch_grid(tiny_bos_model, tokens_for(), state=state, **{**OPTIONS, **change})


def test_other_tokens_are_refused(tiny_bos_model, tmp_path):
    state = tmp_path / "state.safetensors"
    options = OPTIONS | {"source": Corrupted(tokens_for(1))}
    patch_grid(tiny_bos_model, tokens_for(), state=state, **options)
    with pytest.raises(ValueError, match="begun with tokens '"):
        patch_grid(tiny_bos_model, tokens_for(2), state=state, **options)
    with pytest.raises(ValueError, match="begun with ids of corrupted '"):
        patch_grid(
            tiny_bos_model, tokens_for(), state=state, **{**options, "source": Corrupted(tokens_for(2))}
        )


def test_other_weights_of_the_same_name_are_refused(tiny_directories, tmp_path):
    state = tmp_path / "state.safetensors"
    model, seen = load_model(tiny_directories / "gpt2"), []

    def stopping(logits):
        seen.append(1)
        if len(seen) > 4:
            raise KeyboardInterrupt
        return logits.max()

    with pytest.raises(KeyboardInterrupt):
        patch_grid(model, tokens_for()[:1], metric=stopping, state=state, **OPTIONS)
    with torch.no_grad():
        model.blocks[0].attn.W_O.mul_(2)
    seen.clear()
    with pytest.raises(ValueError, match="these are other weights; delete the file"):
        patch_grid(model, tokens_for()[:1], metric=stopping, state=state, **OPTIONS)


def test_a_state_needs_functions_with_a_name(tiny_bos_model, tmp_path):
    with pytest.raises(ValueError, match="one lambda from another: make the metric by def"):
        patch_grid(
            tiny_bos_model,
            tokens_for(),
            metric=lambda x: x.max(),
            state=tmp_path / "s.safetensors",
            **OPTIONS,
        )
    folder = tmp_path / "d.safetensors"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"must be a .safetensors file, but .* is a folder"):
        patch_grid(tiny_bos_model, tokens_for(), state=folder, **OPTIONS)


def test_a_state_that_is_none_is_said_to_be_none(tiny_bos_model, tmp_path):
    found = patch_grid(tiny_bos_model, tokens_for(), **OPTIONS)
    saved = found.save(tmp_path / "grid.safetensors")
    for state, message in (
        (saved, "is not a checkpoint of a sweep of patches"),
        (tmp_path / "state.pt", "must be a .safetensors file"),
        (tmp_path / "no" / "state.safetensors", "does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            patch_grid(tiny_bos_model, tokens_for(), state=state, **OPTIONS)
    assert type(found).load(saved) == found, "what was refused is not overwritten"
