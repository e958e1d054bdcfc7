"""docs/architectures.md is correct for each architecture, and verification would detect faults."""

from __future__ import annotations

import importlib.metadata
import math
import re
from pathlib import Path

import pytest
import torch

from mechlens.errors import ModelLoadError
from mechlens.models.load import engines
from mechlens.models.load.hub import BUNDLED
from mechlens.models.load.loading import load_model
from mechlens.models.load.tiny_architectures import (
    ARCHITECTURES,
    CONTEXT,
    architecture,
    limits,
    random_model,
    write_model,
    write_tokenizer,
)
from mechlens.show.markdown import section_markdown
from mechlens.studies import architectures, supported_analyses
from mechlens.studies.architectures import (
    TOLERANCE,
    Verified,
    architectures_section,
    verify_architecture,
    verify_architectures,
    verify_model,
)
from mechlens.studies.supported_analyses import Analysis
from tests.shared import BACKENDS, HAS_HOOKED
from tests.tiny_models import write_tiny_model, write_toy

DOCS = Path(__file__).parents[2] / "docs" / "architectures.md"
NAMES = [each.name for each in ARCHITECTURES]
LIMITED = [each.name for each in ARCHITECTURES if limits(each.config())]
COLUMNS = tuple(each.heading for each in Verified.columns)
MEASURED = ("within, nats", "beyond, nats")


def documented() -> dict[str, dict[str, str]]:
    """The rows of the installed engine's table, by model."""
    major = importlib.metadata.version("transformer-lens").split(".")[0]
    section = re.search(rf"^## TransformerLens {major}\..*?(?=^## |\Z)", DOCS.read_text("utf-8"), re.M | re.S)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in re.findall(r"^\|.*", section[0].split("\n\nWhat")[0], re.M)
    ]
    assert tuple(rows[0]) == COLUMNS
    return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in rows[2:]}


def test_every_declared_model_is_documented():
    assert [name for name in documented() if name in NAMES] == NAMES
    assert {*documented()} - {*NAMES} == {BUNDLED, "smollm2-135m"}


@pytest.mark.parametrize("name", NAMES)
def test_the_docs_are_right(name):
    """Verdicts match the documented ones, and differences documented as rounding are."""
    # the docs cover processed and raw weights, which test_loading.py compares for some models
    found = verify_architecture(architecture(name), both=False)
    row, said = dict(zip(COLUMNS, found.row, strict=True)), documented()[name]
    for column in COLUMNS:
        if column not in MEASURED:
            assert row[column] == said[column], column
        else:
            assert bool(row[column]) == bool(said[column])
            assert not said[column] or float(said[column]) <= TOLERANCE
    assert found.right == (said["engine"] != "does not load")
    assert all(each <= TOLERANCE for each in found.differences)


@pytest.mark.parametrize("name", LIMITED)
def test_an_ignored_window_or_scaling_would_be_detected(name):
    """Without its window or scaling, Hugging Face's model predicts something else beyond the limit."""
    config, plain = architecture(name).config(), architecture(name).config()
    begins = limits(config)
    if "window" in begins:
        setattr(plain, "window_size" if name == "GPT-Neo" else "sliding_window", CONTEXT)
        for layer in range(2) if name == "GPT-Neo" else ():
            assert config.attention_layers[layer] == ("global", "local")[layer]
    for rope in engines.rope_parameters(plain):
        rope["rope_type"] = "default"
    tokens = torch.randint(0, config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made, other = (random_model(each)(tokens).logits[0].log_softmax(-1) for each in (config, plain))
    off = (made - other).abs().amax(-1)
    # only a window, and scalings that take effect in longer texts
    assert off[min(begins.values()) :].max() > 0.1
    if {*begins} == {"window"}:
        assert off[: begins["window"]].max() < TOLERANCE


def test_limits_are_read_from_the_config():
    assert limits(architecture("Llama").config()) == {}
    assert limits(architecture("Mistral").config()) == {"window": 24}
    assert limits(architecture("Mistral").config(sliding_window=CONTEXT)) == {}
    assert limits(architecture("Mistral").config(sliding_window=None)) == {}
    assert limits(architecture("GPT-Neo").config()) == {"window": 24}
    assert limits(architecture("GPT-Neo").config(attention_types=[[["global"], 2]])) == {}
    assert limits(architecture("Qwen2 (window)").config(use_sliding_window=False)) == {}
    assert limits(architecture("Gemma 3").config()) == {"window": 24, "linear": 32}
    assert limits(architecture("Llama (dynamic)").config()) == {"dynamic": 24}
    assert limits(architecture("Llama (linear)").config()) == {"linear": 24}
    assert limits(architecture("Phi-3 (longrope)").config()) == {"longrope": 24}


NESTED = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "attention_factor": 1.0,
        "original_max_position_embeddings": 24,
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scaling_in_only_some_layers_is_not_ignored(tmp_path, backend):
    """It takes effect beyond the 16 tokens that are compared; HookedTransformer was accepted 1 nat off."""
    config = architecture("OLMo 3 (yarn)").config(rope_parameters=NESTED)
    write_model(tmp_path / "olmo3", random_model(config))
    write_tokenizer(tmp_path / "olmo3")
    if backend == "hooked":
        with pytest.raises(ModelLoadError, match=r"Olmo3.* does not support 'longrope' scaling"):
            load_model(tmp_path / "olmo3", backend=backend)
        return
    assert verify_model(tmp_path / "olmo3").right


@pytest.mark.skipif(not HAS_HOOKED, reason="tests settings of HookedTransformer")
@pytest.mark.parametrize("name", ["Mistral", "Qwen3"])
def test_a_context_is_no_longer_than_the_models(tmp_path, name):
    """The engine assumes 2048 for all models of some architectures."""
    write_model(tmp_path / "model", random_model(architecture(name).config()))
    write_tokenizer(tmp_path / "model")
    assert load_model(tmp_path / "model", backend="hooked").cfg.n_ctx == CONTEXT


class TestAFaultIsSeen:
    """Errors of a model or an analysis are in the table."""

    @pytest.fixture
    def broken(self, monkeypatch):
        """Apply a function to every model that is loaded."""

        def with_fault(fault):
            def load(*given, **options):
                model = load_model(*given, **options)
                fault(model)
                return model

            monkeypatch.setattr(architectures, "load_model", load)

        return with_fault

    def test_in_predictions(self, broken):
        broken(lambda model: model.blocks[0].hook_resid_pre.add_hook(lambda x, hook: x * 1.1))
        found = verify_architecture(architecture("GPT-2"), both=False)
        assert not found.right
        assert ", wrong" in found.row[COLUMNS.index("within, nats")]

    def test_beyond_a_window_alone(self, broken):
        def no_window(model, at=24):
            def repeat(x, hook):
                # as if positions beyond the window were different
                return torch.cat([x[:, :at], x[:, at:].flip(1)], dim=1)

            model.blocks[0].hook_resid_pre.add_hook(repeat)

        broken(no_window)
        found = verify_architecture(architecture("Mistral"), both=False)
        before, beyond = found.differences
        assert before <= TOLERANCE < beyond
        assert not found.right

    def test_in_circuits(self, monkeypatch):
        own = supported_analyses.QK
        monkeypatch.setattr(
            supported_analyses,
            "QK",
            lambda model, head, relative_position: own(model, head, relative_position=3),
        )
        qk = verify_architecture(architecture("Llama"), both=False).qk
        assert (qk.verdict, "misses the original's scores by" in qk.reason) == ("no", True)

    def test_in_attribution(self, monkeypatch):
        own = supported_analyses.direct_logit_attribution
        monkeypatch.setattr(
            supported_analyses,
            "direct_logit_attribution",
            lambda model, tokens, target, against: own(model, tokens, target, against=against + 1),
        )
        found = verify_architecture(architecture("GPT-2"), both=False).attribution
        assert (found.verdict, "miss the original's logits by" in found.reason) == ("no", True)


def test_all_or_some_are_verified(monkeypatch):
    seen = []
    nothing = Analysis("no")

    def verified(name):
        seen.append(name)
        return Verified(name, None, "", {}, (), (), {}, nothing, nothing, nothing)

    monkeypatch.setattr(architectures, "verify_architecture", lambda each, **given: verified(each.name))
    monkeypatch.setattr(architectures, "verify_model", lambda name, **given: verified(name))
    verify_architectures(progress=False)
    assert seen[: len(NAMES)] == NAMES
    assert set(seen[len(NAMES) :]) - {"smollm2-135m"} == {BUNDLED}
    for like, expected in (("PHI-3", ["Phi-3", "Phi-3 (longrope)"]), ("books", [BUNDLED])):
        seen.clear()
        verify_architectures(like=like, progress=False)
        assert seen == expected
    with pytest.raises(
        ValueError, match=r"no architecture has 'Lllama' in its name: choose among GPT-2, GPT-Neo"
    ):
        verify_architectures(like="Lllama", progress=False)


def test_weights_that_load_only_processed_or_raw_are_reported(monkeypatch):
    def load(*given, processing, **options):
        if not processing:
            raise ModelLoadError("no such weights: try others")
        return load_model(*given, processing=processing, **options)

    monkeypatch.setattr(architectures, "load_model", load)
    found = verify_architecture(architecture("GPT-2"))
    assert found.right
    assert found.reasons == ("unprocessed: no such weights",)


def test_a_failed_verification_is_an_error_not_a_verdict(tmp_path):
    write_toy(tmp_path / "toy")
    with pytest.raises(ValueError, match="toy is in TransformerLens's own format"):
        verify_model(tmp_path / "toy")
    write_tiny_model(tmp_path / "cut", "gpt2")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match="is truncated or corrupt"):
        verify_model(tmp_path / "cut")
    with pytest.raises(ValueError, match=r"device must be .* got 'quantum'"):
        verify_model(BUNDLED, device="quantum")


def test_markdown_has_the_same_contents_as_the_table():
    found = verify_architecture(architecture("Qwen3"))
    text = section_markdown(architectures_section([found]))
    assert f"TransformerLens {importlib.metadata.version('transformer-lens')}" in text
    assert f"| {' | '.join(found.row)} |" in text
    assert "| Qwen3 | QK circuits: " in text
    assert math.isclose(float(found.row[3]), found.differences[0], rel_tol=0.5)
