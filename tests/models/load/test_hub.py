"""Downloads from a small hub that runs in the test."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from mechlens.errors import ModelLoadError
from mechlens.models.load import hub as hub_module
from mechlens.models.load.loading import load_model
from mechlens.models.protocol import describe
from mechlens.text.tokens import own_bos_token_id
from tests.tiny_models import write_tiny_model, write_tokenizer, write_toy

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        self.asked.append(path)
        parts = path.removeprefix("api/models/").split("/")
        repository = self.root.joinpath(*parts[:2])
        if not repository.is_dir():
            self.reply(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
            return
        files = sorted(file.relative_to(repository).as_posix() for file in repository.rglob("*.*"))
        if not path.startswith("api/"):
            content = (repository / "/".join(parts[4:])).read_bytes()
            tag = hashlib.sha256(content).hexdigest()[:40]
            self.reply(200, content, {"X-Repo-Commit": SHA, "ETag": f'"{tag}"'}, body)
        elif "tree" in parts:
            tree = [
                {"type": "file", "path": file, "oid": "0" * 40, "size": (repository / file).stat().st_size}
                for file in files
            ]
            self.reply(200, json.dumps(tree).encode(), {}, body)
        else:
            info = {
                "id": "/".join(parts[:2]),
                "sha": SHA,
                "siblings": [{"rfilename": file} for file in files],
            }
            self.reply(200, json.dumps(info).encode(), {}, body)

    def reply(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that serves folders as repositories: its root, and the list of requested paths."""
    from huggingface_hub import constants

    (tmp_path / "hub").mkdir()
    asked: list[str] = []
    handler = type("Here", (Hub,), {"root": tmp_path / "hub", "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield tmp_path / "hub", asked
        server.shutdown()


def test_only_needed_files_are_downloaded_and_only_once(hub):
    root, asked = hub
    repository = root / "someone" / "model"
    model = write_tiny_model(repository, "gpt_neox")
    (repository / "onnx").mkdir()
    for other in ("pytorch_model.bin", "tf_model.h5", "onnx/model.safetensors", "training_args.bin"):
        (repository / other).write_bytes(b"of no use")
    loaded = load_model("someone/model", revision="v1")
    info = describe(loaded)
    assert (info.name, info.revision) == ("someone/model", "v1")
    downloaded = {path.split("/resolve/")[1].split("/", 1)[1] for path in asked if "/resolve/" in path}
    assert "model.safetensors" in downloaded
    assert "config.json" in downloaded
    assert not downloaded & {
        "pytorch_model.bin",
        "tf_model.h5",
        "onnx/model.safetensors",
        "training_args.bin",
    }
    asked.clear()
    assert describe(load_model("someone/model", revision="v1")) == info
    assert not asked
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        error = loaded(tokens).log_softmax(-1) - model(tokens).logits.log_softmax(-1)
    assert error.abs().max() < 2e-5


def test_a_name_that_the_hub_does_not_have_is_an_error(hub):
    with pytest.raises(ModelLoadError, match=r"unknown model 'EleutherAI/pythia-71m'.*: did you mean"):
        load_model("EleutherAI/pythia-71m")


def test_pickles_are_downloaded_only_if_necessary(hub):
    root, _ = hub
    repository = root / "someone" / "old"
    model = write_tiny_model(repository, "gpt2")
    (repository / "model.safetensors").unlink()
    torch.save(model.state_dict(), repository / "pytorch_model.bin")
    assert describe(load_model("someone/old")).name == "someone/old"
    (repository / "pytorch_model.bin").rename(repository / "weights.h5")
    with pytest.raises(ModelLoadError, match="the repository has no PyTorch weights"):
        load_model("someone/old", revision="other")


def test_models_in_transformer_lens_format_are_downloaded(hub):
    """Like the attention-only models on the hub: older settings, a `.pth` file, another tokenizer."""
    root, asked = hub
    repository = root / "NeelNanda" / "Attn_Only_2L512W_C4_Code"
    weights = write_toy(repository)
    config = json.loads((repository / "config.json").read_text())
    config |= {"normalization": config.pop("normalization_type"), "lr": 0.001, "d_mlp": 128}
    config |= {"act_fn": "solu_ln", "tokenizer_name": "NeelNanda/gpt-neox-tokenizer-digits"}
    (repository / "config.json").write_text(json.dumps(config))
    (repository / "model.safetensors").unlink()
    torch.save(weights, repository / "model_final.pth")
    (root / "NeelNanda" / "gpt-neox-tokenizer-digits").mkdir()
    write_tokenizer(root / "NeelNanda" / "gpt-neox-tokenizer-digits", bos_is_eos=False)
    model = load_model("attn-only-2l")
    info = describe(model)
    assert (info.name, info.architecture) == ("NeelNanda/Attn_Only_2L512W_C4_Code", "attention-only")
    assert own_bos_token_id(model.tokenizer) == 1
    asked.clear()
    load_model("attn-only-2l")
    assert not asked


def test_the_parsed_table_of_models_matches_the_imported_one():
    assert hub_module._tables_as_data() == hub_module._tables_by_import()
    assert hub_module.hub_name("pythia-70m") == "EleutherAI/pythia-70m"


def test_a_table_that_cannot_be_parsed_is_imported(tmp_path, monkeypatch):
    """Later versions may have such a table."""
    known = hub_module.known_hub_names()
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    called = "OFFICIAL_MODEL_NAMES: list = sorted([])\nMODEL_ALIASES: dict = {}"
    for text in (None, "NAMES = [1]", called, "("):
        if text is not None:
            (tmp_path / "supported_models.py").write_text(text)
        hub_module.known_hub_names.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(hub_module.importlib.util, "find_spec", lambda name: spec)
            assert hub_module._tables_as_data() is None
            assert hub_module.known_hub_names() == known
