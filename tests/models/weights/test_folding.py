"""Weights with folded norms, in cases that circuits do not cover."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from mechlens.models.load.loading import load_model
from mechlens.models.run.unembedding import final_norm
from mechlens.models.weights import folding
from mechlens.models.weights.folding import folded_heads, from_tokens, position_vectors, to_logits
from tests.close import assert_close
from tests.reference import circuits as reference
from tests.tiny_models import tiny_hf_model, write_toy


@pytest.fixture(params=[True, False], ids=["processed", "raw"])
def processing(request):
    return request.param


def test_logits_of_any_vector_are_differences_between_the_models_own(tiny_directories, processing):
    """For x and -x, which have the same norm scale, biases cancel in half the difference."""
    for kind in ("gpt2", "llama"):
        model = load_model(tiny_directories / kind, processing=processing)
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) + 1
        centered = x - x.mean(1, keepdim=True) if kind == "gpt2" else x
        scale = (centered.square().mean(1, keepdim=True) + model.cfg.eps).sqrt()
        with torch.no_grad():
            up, down = (final_norm(model, sign * x[None])[0] @ model.W_U for sign in (1, -1))
        expected = (up - down) / 2 * scale
        expected = expected - expected.mean(1, keepdim=True)
        # float32 sums of 32 terms
        assert torch.allclose(to_logits(model, x), expected, atol=2e-5)


def test_the_vocabulary_is_processed_in_parts(tiny_directories, monkeypatch, processing):
    model = load_model(tiny_directories / "gpt2", processing=processing)
    reading = folded_heads(model, 1).W_V[0]
    whole = [from_tokens(model, reading, effective=effective) for effective in (False, True)]
    monkeypatch.setattr(folding, "TOKENS_AT_ONCE", 10)
    monkeypatch.setattr(folding, "EMBEDDED_AT_ONCE", 20)
    # the same sums in matrices of other sizes
    for effective in (False, True):
        assert torch.allclose(from_tokens(model, reading, effective=effective), whole[effective], atol=1e-5)


def test_positions_match_the_models_embeddings(tiny_directories):
    truth = reference.of_hf(tiny_hf_model("gpt2"), "gpt2")
    model = load_model(tiny_directories / "gpt2", processing=False)
    assert torch.equal(position_vectors(model).double(), truth.W_pos)


def test_a_final_norm_that_keeps_the_mean(tmp_path):
    """LayerNorm in the blocks, RMSNorm at the end: the logits depend on the mean of each block's output.

    The weights are raw, because HookedTransformer's processing would change this model's final norm.
    """
    weights = write_toy(tmp_path / "toy", final_rms=True)
    del weights["ln_final.b"]
    save_file(weights, tmp_path / "toy" / "model.safetensors")
    model = load_model(tmp_path / "toy", processing=False)
    W_U = weights["ln_final.w"][:, None] * weights["unembed.W_U"]
    heads = folded_heads(model, 1)
    assert torch.allclose(heads.W_O, weights["blocks.1.attn.W_O"], atol=1e-6)
    found = to_logits(model, heads.W_O[0])
    expected = weights["blocks.1.attn.W_O"][0] @ (W_U - W_U.mean(1, keepdim=True))
    # float32 sums of 32 terms
    assert torch.allclose(found, expected, atol=1e-5)


def test_the_model_is_unchanged_and_has_no_hooks(tiny_directories):
    model = load_model(tiny_directories / "gpt2", processing=False)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        before = model(tokens)
    from_tokens(model, folded_heads(model, 0).W_Q[0], effective=True)
    position_vectors(model)
    with torch.no_grad():
        assert_close(model(tokens), before)
