"""Errors of loading: each says what is wrong and what to do."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mechlens.errors import ArgumentError, ModelLoadError
from mechlens.models.load import loading
from mechlens.models.load.loading import load_model
from mechlens.models.protocol import engine_of
from tests.close import assert_close
from tests.shared import BACKENDS, HAS_HOOKED
from tests.tiny_models import tiny_hf_model, write_tiny_model, write_tokenizer

NOT_NEAR = r"config.json\): give the bundled .* or a directory; `mechlens models` lists the known names$"


@pytest.fixture
def directory(tiny_directories, tmp_path):
    """A copy of a GPT-2's directory, for the test to damage."""
    return Path(shutil.copytree(tiny_directories / "gpt2", tmp_path / "spoilt"))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


class TestNames:
    @pytest.mark.parametrize(
        ("name", "near"),
        [
            ("gtp2", r"did you mean gpt2\? Otherwise give"),
            ("pythia70m", "did you mean EleutherAI/pythia-70m or"),
            ("mechlens-book", "did you mean mechlens-books"),
            ("pythia-71m", r"did you mean EleutherAI/pythia-70m .*or a directory$"),
            ("lama", r"did you mean [\w/-]*llama-7b"),
            # facebook/opt-125m is also known as opt, but that is two letters away
            *((name, NOT_NEAR) for name in ("qqqqqqqqq", "nope", "bert", "model")),
            ("", "the model's name is empty"),
        ],
    )
    def test_an_unknown_name_suggests_similar_ones(self, name, near):
        with pytest.raises(ModelLoadError, match=near):
            load_model(name)

    @pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "unreachable"])
    @pytest.mark.parametrize("name", ["gpt2-small", "EleutherAI/pythia-71m"])
    def test_without_a_network_the_error_comes_at_once(self, empty_cache, monkeypatch, name, offline):
        from huggingface_hub import constants

        if offline:
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        else:
            # a port without a listener, so that the test is the same with a network
            monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        waits = []
        monkeypatch.setattr(time, "sleep", waits.append)
        with pytest.raises(ModelLoadError) as caught:
            load_model(name)
        assert waits == [], "the hub's client waits before it tries again"
        message = str(caught.value)
        assert name.replace("-small", "") in message
        assert "cannot be reached" in message
        assert ("HF_HUB_OFFLINE is set" in message) == offline
        assert "the bundled 'mechlens-books' or a directory" in message
        assert ("similar names: EleutherAI/pythia-70m" in message) == name.endswith("71m")

    def test_wrong_revisions_and_checkpoints_are_refused(self, directory, empty_cache, monkeypatch):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ModelLoadError, match="is a directory and has no revisions"):
            load_model(directory, revision="main")
        with pytest.raises(ModelLoadError, match="not both"):
            load_model("pythia-70m", revision="main", checkpoint=1)
        with pytest.raises(ModelLoadError, match="does not know how gpt2 names its checkpoints"):
            load_model("gpt2", checkpoint=1)
        with pytest.raises(ModelLoadError, match="EleutherAI/pythia-70m at revision 'step512'"):
            load_model("pythia-70m", checkpoint=512)
        with pytest.raises(ModelLoadError, match="mechlens-books has no revisions or checkpoints"):
            load_model("mechlens-books", revision="main")

    def test_missing_bundled_weights_are_an_error(self, tmp_path, monkeypatch):
        monkeypatch.setattr(loading, "BUNDLED_DIRECTORY", tmp_path)
        with pytest.raises(ModelLoadError, match=r"bundled model .* missing from this installation"):
            load_model()


class TestDirectories:
    def test_a_missing_directory_is_an_error(self):
        with pytest.raises(ModelLoadError, match="no-such-folder does not exist"):
            load_model("./no-such-folder")

    def test_a_file_is_not_a_directory(self, directory):
        with pytest.raises(ModelLoadError, match="is a file: give a directory"):
            load_model(directory / "config.json")

    def test_a_missing_config_is_an_error(self, directory):
        (directory / "config.json").unlink()
        with pytest.raises(ModelLoadError, match=r"has no config\.json"):
            load_model(directory)

    @pytest.mark.parametrize("text", ["{", "[1]", "\0"])
    def test_a_damaged_config_is_an_error(self, directory, text):
        (directory / "config.json").write_text(text)
        with pytest.raises(ModelLoadError, match=r"config\.json is not (valid JSON|a JSON object)"):
            load_model(directory)

    def test_a_missing_tokenizer_is_an_error(self, directory):
        for file in directory.glob("tokenizer*"):
            file.unlink()
        with pytest.raises(ModelLoadError, match=r"has no tokenizer: copy the model's tokenizer\.json"):
            load_model(directory)

    def test_a_damaged_tokenizer_is_an_error(self, directory):
        (directory / "tokenizer.json").write_text('{"version": ')
        with pytest.raises(ModelLoadError, match=r"the tokenizer in .* cannot be read"):
            load_model(directory)

    def test_missing_weights_are_an_error(self, directory):
        (directory / "model.safetensors").unlink()
        with pytest.raises(ModelLoadError, match=r"no weights: copy model\.safetensors there"):
            load_model(directory)

    @pytest.mark.parametrize("keep", [0, 5, 400, -1], ids=str)
    def test_truncated_safetensors_are_an_error(self, directory, keep):
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(ModelLoadError, match=r"model\.safetensors is truncated or corrupt"):
            load_model(directory)

    def test_corrupt_safetensors_are_an_error(self, directory):
        (directory / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(ModelLoadError, match="truncated or corrupt"):
            load_model(directory)

    def test_a_missing_shard_is_an_error(self, tmp_path):
        tiny_hf_model("gpt2").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        write_tokenizer(tmp_path / "shards")
        load_model(tmp_path / "shards")
        shard = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(ModelLoadError, match=rf"lacks 1 of its \d+ weight files: copy {shard.name}"):
            load_model(tmp_path / "shards")
        (tmp_path / "shards" / "model.safetensors.index.json").write_text("{}")
        with pytest.raises(ModelLoadError, match=r"index\.json is damaged"):
            load_model(tmp_path / "shards")

    def test_missing_tensors_are_an_error_and_not_random(self, directory):
        weights = load_file(directory / "model.safetensors")
        del weights["transformer.h.1.mlp.c_fc.weight"]
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelLoadError, match=r"lack 1 tensors .* transformer\.h\.1\.mlp\.c_fc\.weight"):
            load_model(directory)

    def test_tensors_of_other_sizes_are_an_error(self, directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"n_embd": 16}))
        with pytest.raises(ModelLoadError, match="cannot be read as GPT2LMHeadModel"):
            load_model(directory)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestPickles:
    def write(self, directory: Path, **more) -> None:
        weights = {f"{name}": value for name, value in load_file(directory / "model.safetensors").items()}
        (directory / "model.safetensors").unlink()
        torch.save(weights | more, directory / "pytorch_model.bin")

    def test_a_pickle_of_tensors_is_read(self, directory, tiny_directories):
        self.write(directory)
        tokens = torch.arange(20)[None]
        with torch.no_grad():
            assert_close(load_model(directory)(tokens), load_model(tiny_directories / "gpt2")(tokens))

    def test_code_in_a_pickle_is_not_run(self, directory, tmp_path):
        self.write(directory, more=Malicious(tmp_path / "owned"))
        with pytest.raises(ModelLoadError, match=r"more than tensors.* as model\.safetensors"):
            load_model(directory)
        assert not (tmp_path / "owned").exists()
        # check that the pickle works without the guard, or the test would prove nothing
        torch.load(directory / "pytorch_model.bin", weights_only=False)
        assert (tmp_path / "owned").exists()

    def test_a_damaged_pickle_is_an_error(self, directory):
        (directory / "model.safetensors").unlink()
        (directory / "pytorch_model.bin").write_bytes(b"not a pickle")
        with pytest.raises(ModelLoadError, match="is damaged, or contains more than tensors"):
            load_model(directory)


class TestArchitectures:
    def save(self, directory: Path, model) -> Path:
        model.save_pretrained(directory)
        write_tokenizer(directory)
        return directory

    def test_encoder_only_models_are_refused(self, tmp_path):
        import transformers

        config = transformers.BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
        )
        for cls in (transformers.BertForMaskedLM, transformers.BertModel):
            place = self.save(tmp_path / cls.__name__, cls(config))
            with pytest.raises(ModelLoadError, match=f"is a {cls.__name__}, an encoder-only model"):
                load_model(place)

    def test_encoder_decoder_models_are_refused(self, tmp_path):
        import transformers

        config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
        place = self.save(tmp_path / "t5", transformers.T5ForConditionalGeneration(config))
        with pytest.raises(ModelLoadError, match="encoder-decoder model: mechlens reads decoder-only"):
            load_model(place)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_models_without_attention_are_refused(self, tmp_path, backend):
        import transformers

        config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
        place = self.save(tmp_path / "mamba", transformers.MambaForCausalLM(config))
        told = {"hooked": "does not support MambaForCausalLM", "bridge": "has no attention patterns"}
        with pytest.raises(ModelLoadError, match=told[backend]):
            load_model(place, backend=backend)

    @pytest.mark.parametrize(
        ("config", "told"),
        [
            ({"model_type": "odd"}, "has model_type 'odd', which transformers does not know"),
            ({"hidden_size": 3}, "has no model_type"),
            ({"model_type": "gpt2", "architectures": ["OddForCausalLM"]}, "code that is not in transformers"),
        ],
        ids=["unknown", "none", "remote code"],
    )
    def test_unknown_architectures_are_refused(self, directory, config, told):
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelLoadError, match=told):
            load_model(directory)

    @pytest.mark.skipif(not HAS_HOOKED, reason="the bridge has these")
    @pytest.mark.parametrize(
        ("kind", "changes", "told"),
        [
            # only the comparison of predictions notices this one
            ("llama", {"attention_bias": True}, "does not predict what the original does"),
            (
                "llama",
                {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
                "does not support 'linear' scaling of rotary positions",
            ),
            (
                "qwen2",
                {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
                "does not support sliding-window attention",
            ),
        ],
        ids=["bias", "rope scaling", "sliding window"],
    )
    def test_settings_that_hooked_lacks_fall_back_to_the_bridge(self, tmp_path, kind, changes, told):
        write_tiny_model(tmp_path / kind, kind, **changes)
        with pytest.raises(ModelLoadError, match=f"{told}.*(use|try) .*backend='bridge'"):
            load_model(tmp_path / kind, backend="hooked")
        # without a choice of engine the bridge is used, with a warning that sweeps are slower
        with pytest.warns(UserWarning, match=rf"runs on a TransformerBridge.* \(.*{told}"):
            model = load_model(tmp_path / kind)
        assert engine_of(model) == "TransformerBridge"


class TestArguments:
    @pytest.mark.parametrize("dtype", ["float8", "int8", "nonsense", torch.int64, torch.complex64], ids=str)
    def test_other_dtypes_are_refused(self, directory, dtype):
        with pytest.raises(ArgumentError, match=f"dtype must be float32, .* got '{dtype}'"):
            load_model(directory, dtype=dtype)

    @pytest.mark.parametrize("device", ["foo", "", "cpu:x"])
    def test_other_devices_are_refused(self, directory, device):
        with pytest.raises(ArgumentError, match=f"device must be a device such as .* got '{device}'"):
            load_model(directory, device=device)

    @pytest.mark.parametrize("device", ["cuda:99", "meta"])
    def test_devices_that_this_machine_lacks_are_refused(self, directory, device):
        with pytest.raises(ModelLoadError, match=f"device '{device}' is not available"):
            load_model(directory, device=device)

    def test_other_backends_are_refused(self, directory):
        with pytest.raises(ArgumentError, match="backend must be 'auto', 'hooked' or 'bridge', got 'x'"):
            load_model(directory, backend="x")

    @pytest.mark.skipif(HAS_HOOKED, reason="TransformerLens 3 has HookedTransformer")
    def test_a_backend_that_is_not_installed_is_refused(self, directory):
        with pytest.raises(ModelLoadError, match="does not have: use backend='bridge'"):
            load_model(directory, backend="hooked")
