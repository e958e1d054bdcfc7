"""Published tuned lenses, written by a literal implementation and read back."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from mechlens.errors import ModelLoadError
from mechlens.models.load.published_lens import load_tuned_lens
from mechlens.results import TunedLens
from tests.reference.tuned_lens import PublishedLens, residuals


@pytest.fixture(scope="session")
def raw_model(load_once, tiny_directories):
    return load_once(tiny_directories / "gpt2", processing=False)


@pytest.fixture
def published() -> PublishedLens:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PublishedLens(n_layers=2, d_model=32)


def config(**changes) -> dict:
    return {
        "base_model_name_or_path": "gpt2",
        "d_model": 32,
        "num_hidden_layers": 2,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": "0" * 64,
        "lens_type": "linear_tuned_lens",
    } | changes


def write(folder: Path, state: object, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(**changes)))
    torch.save(state, folder / "params.pt")
    return folder


def old_state(published: PublishedLens, *, name: str = "translator", with_input: bool = True) -> dict:
    """Old checkpoints: a separate translator for the embedding, the others indexed from layer 0's output."""
    state = {"unembedding.weight": torch.zeros(64, 32), "layer_norm.weight": torch.ones(32)}
    for index, layer in enumerate(published.translators):
        prefix = f"layer_{name}s.{index - 1}" if index else f"input_{name}"
        if index or with_input:
            state |= {f"{prefix}.{key}": value for key, value in layer.state_dict().items()}
    return state


def check(lens: TunedLens, published: PublishedLens, model) -> None:
    tokens = torch.randint(4, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    stream = residuals(model, tokens)
    with torch.no_grad():
        for row in lens.rows:
            index = 0 if row == "embed" else int(row) + 1
            # float32 sums in a different order, for a raw stream with components of about ten
            assert torch.allclose(
                lens.translate(row, stream[index]), published(stream[index], index), atol=1e-4
            )


def test_a_published_lens_matches_its_library(raw_model, published, tmp_path) -> None:
    folder = write(tmp_path / "gpt2", published.translators.state_dict())
    for source in (folder, str(folder)):
        lens = load_tuned_lens(source, model=raw_model)
        assert lens.rows == ("embed", "0")
        check(lens, published, raw_model)
    assert lens.source == "gpt2"
    assert lens.steps is None
    assert lens.kl_tuned.isnan().all()
    lens.check_fits(lens.model)
    assert TunedLens.load(lens.save(tmp_path / "lens.safetensors")) == lens


@pytest.mark.parametrize("name", ["translator", "adapter", "probe"])
def test_old_layouts_are_read(raw_model, published, tmp_path, name) -> None:
    folder = write(tmp_path / "old", old_state(published, name=name))
    (folder / "config.json").write_text(json.dumps({"d_model": 32, "num_layers": 2, "vocab_size": 64}))
    lens = load_tuned_lens(folder, model=raw_model)
    assert lens.rows == ("embed", "0")
    check(lens, published, raw_model)


def test_an_old_lens_without_the_embedding_has_no_row_for_it(raw_model, published, tmp_path) -> None:
    folder = write(tmp_path / "old", old_state(published, with_input=False))
    lens = load_tuned_lens(folder, model=raw_model)
    assert lens.rows == ("0",)
    check(lens, published, raw_model)


def test_translators_without_bias_and_in_half_precision_are_read(raw_model, tmp_path) -> None:
    published = PublishedLens(n_layers=2, d_model=32, bias=False)
    lens = load_tuned_lens(
        write(tmp_path / "a", published.translators.state_dict(), bias=False), model=raw_model
    )
    check(lens, published, raw_model)
    half = {key: value.half() for key, value in published.translators.state_dict().items()}
    lens = load_tuned_lens(write(tmp_path / "b", half, bias=False), model=raw_model)
    assert lens.weight.dtype == torch.float32
    assert torch.equal(lens.weight[1].T, half["1.weight"].float())


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_pickle_is_not_run(raw_model, published, tmp_path) -> None:
    mark = tmp_path / "run"
    state = published.translators.state_dict() | {"extra": Malicious(mark)}
    folder = write(tmp_path / "lens", state)
    with pytest.raises(ModelLoadError, match="could run code, so it is not read"):
        load_tuned_lens(folder, model=raw_model)
    assert not mark.exists()
    (folder / "params.pt").write_bytes(pickle.dumps(Malicious(mark), protocol=2))
    with pytest.raises(ModelLoadError, match="could run code, so it is not read"):
        load_tuned_lens(folder, model=raw_model)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 64}, "has d_model 64, but the model has 32"),
        ({"num_hidden_layers": 3}, "has layers 3, but the model has 2"),
        ({"lens_type": "mlp"}, "describes a mlp, but only a linear_tuned_lens"),
        ({"extra_layers": 1}, "has 1 extra layers"),
        ({"reuse_unembedding": False}, "a separate unembedding for each layer"),
    ],
)
def test_a_lens_of_another_kind_is_refused(raw_model, published, tmp_path, changes, message) -> None:
    folder = write(tmp_path / "lens", published.translators.state_dict(), **changes)
    with pytest.raises(ModelLoadError, match=message):
        load_tuned_lens(folder, model=raw_model)


SQUARE = torch.zeros(32, 32)


def weights(*sizes: int) -> dict:
    state = {f"{index}.weight": torch.zeros(size, size) for index, size in enumerate(sizes)}
    return state | {f"{index}.bias": torch.zeros(size) for index, size in enumerate(sizes)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (weights(32, 32, 32), "has 3 translators, but a model with 2 layers needs 2"),
        ({}, "has 0 translators"),
        (
            {"0.weight": torch.zeros(32, 32), "2.weight": torch.zeros(32, 32)},
            r"translators \[0, 2\]: some are",
        ),
        (weights(32, 16), r"translator 1 in .* has shape \(16, 16\) and a bias of shape \(16,\), but the"),
        ({"0.weight": SQUARE, "1.weight": SQUARE}, "has no bias for translator 0"),
        (weights(32, 32) | {"0.0.weight": torch.zeros(1)}, r"contains '0\.0\.weight', which is not part"),
        (weights(32, 32) | {"0.weight": 3}, r"contains '0\.weight'|does not contain named tensors"),
        (torch.zeros(2), "does not contain named tensors"),
    ],
)
def test_unexpected_tensors_are_refused(raw_model, tmp_path, state, message) -> None:
    folder = write(tmp_path / "lens", state)
    with pytest.raises(ModelLoadError, match=message):
        load_tuned_lens(folder, model=raw_model)


def test_processed_weights_are_refused(tiny_bos_model, published, tmp_path) -> None:
    folder = write(tmp_path / "lens", published.translators.state_dict())
    with pytest.raises(ModelLoadError, match=r"this model's are processed: load it with .*processing=False"):
        load_tuned_lens(folder, model=tiny_bos_model)


def test_a_lens_for_another_model_name_gives_a_warning(raw_model, published, tmp_path) -> None:
    folder = write(tmp_path / "lens", published.translators.state_dict(), base_model_name_or_path="a/GPT3")
    with pytest.warns(UserWarning, match="trained for a/GPT3, but the model is gpt2"):
        load_tuned_lens(folder, model=raw_model)


def test_a_missing_lens_is_an_error(raw_model, published, tmp_path, monkeypatch) -> None:
    folder = write(tmp_path / "lens", published.translators.state_dict())
    (folder / "params.pt").unlink()
    with pytest.raises(ModelLoadError, match=r"and params\.pt: params\.pt is missing"):
        load_tuned_lens(folder, model=raw_model)
    with pytest.raises(ModelLoadError, match=r"config\.json is missing"):
        load_tuned_lens(tmp_path / "absent", model=raw_model)
    with pytest.raises(ModelLoadError, match="is a file, but a published lens is a folder"):
        load_tuned_lens(folder / "config.json", model=raw_model)
    (folder / "params.pt").touch()
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json is not JSON"):
        load_tuned_lens(folder, model=raw_model)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadError, match=r"'gpt2-none' is neither a folder nor .*HF_HUB_OFFLINE is set"):
        load_tuned_lens("gpt2-none", model=raw_model)
    with pytest.raises(ModelLoadError, match="neither a folder nor the name of a published lens"):
        load_tuned_lens("no such thing", model=raw_model)
