"""Models described from their files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mechlens.models.load import loading
from mechlens.models.load.loading import load_model
from mechlens.models.load.registry import known_models, model_summary
from tests.tiny_models import KINDS, tiny_hf_model, write_tiny_model, write_toy

EXPECTED = {
    "gpt2": ("standard", None, True, 128, 4),
    "gpt_neo": ("standard", None, True, 128, 4),
    "gpt_neox": ("rotary", 4, False, 48, 4),
    "llama": ("rotary", 8, False, 48, 2),
    "qwen2": ("rotary", 8, False, 48, 2),
    "gemma2": ("rotary", 16, True, 48, 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_summary_agrees_with_the_loaded_model(tiny_directories, kind):
    summary = model_summary(tiny_directories / kind)
    positions = (summary.positions, summary.rotary_dim)
    assert (*positions, summary.tied, summary.d_mlp, summary.n_key_value_heads) == EXPECTED[kind]
    cfg = load_model(tiny_directories / kind).cfg
    for size in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "d_vocab", "n_ctx"):
        assert getattr(summary, size) == getattr(cfg, size), size
    # transformers also counts a tied matrix once
    assert summary.n_params == tiny_hf_model(kind).num_parameters()
    assert summary.dtype == "float32"


def test_tying_is_read_from_the_weights_not_the_config(tmp_path):
    write_tiny_model(tmp_path / "neox", "gpt_neox")
    weights = load_file(tmp_path / "neox" / "model.safetensors")
    weights["embed_out.weight"] = weights["gpt_neox.embed_in.weight"].clone()
    save_file(weights, tmp_path / "neox" / "model.safetensors", metadata={"format": "pt"})
    assert model_summary(tmp_path / "neox").tied


def test_pickles_and_shards_have_the_same_summary(tmp_path):
    model = write_tiny_model(tmp_path / "pickle", "gpt_neox")
    whole = model_summary(tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    assert model_summary(tmp_path / "pickle") == whole
    model.save_pretrained(tmp_path / "pickle", max_shard_size="20KB")
    assert model_summary(tmp_path / "pickle") == whole


def test_a_summary_of_transformer_lens_format(tmp_path):
    weights = write_toy(tmp_path / "toy")
    summary = model_summary(tmp_path / "toy")
    assert (summary.architecture, summary.d_mlp, summary.positions) == ("attention-only", None, "standard")
    assert summary.n_params == sum(value.numel() for value in weights.values())
    assert not summary.tied


def test_known_models_are_bundled_then_cached_then_on_the_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "models--EleutherAI--pythia-70m"
    write_tiny_model(repository / "snapshots" / ("a" * 40), "gpt_neox")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    known = known_models()
    assert (known[0].name, known[0].source) == (loading.BUNDLED, "bundled")
    assert [model.name for model in known if model.source == "cache"] == ["EleutherAI/pythia-70m"]
    by_name = {model.name: model for model in known}
    assert "gpt2-small" in by_name["gpt2"].aliases
    assert len(by_name) == len(known) > 100
