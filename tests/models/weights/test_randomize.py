"""Random weights match a fresh Hugging Face model, and the engine runs the copy with them."""

from __future__ import annotations

import math

import pytest
import torch

from mechlens.models.load.loading import load_model
from mechlens.models.protocol import describe
from mechlens.models.run.from_embeddings import run_embedded
from mechlens.models.weights.access import final_affine
from mechlens.models.weights.randomize import random_like
from tests.close import assert_close
from tests.tiny_models import VOCAB, write_toy

KINDS = ("gpt2", "gpt_neox", "llama", "gemma2")
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9]])
# float32 sums in a different order
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def trained(tiny_directories):
    models = {}

    def load(kind):
        if kind not in models:
            models[kind] = load_model(tiny_directories / kind, processing=False)
        return models[kind]

    return load


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_itself_is_not_changed(kind, trained):
    model = trained(kind)
    with torch.no_grad():
        before = model(TOKENS)
        weights = {name: each.clone() for name, each in model.named_parameters()}
        other = random_like(model, 0)
        assert not torch.allclose(other(TOKENS), before, atol=0.1)
        assert_close(model(TOKENS), before)
    assert all(torch.equal(each, weights[name]) for name, each in model.named_parameters())
    assert not {id(each) for each in model.parameters()} & {id(each) for each in other.parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_runs_on_its_own_weights(kind, trained):
    other = random_like(trained(kind), 0)
    names = {
        "hook_embed",
        "blocks.0.hook_resid_pre",
        "blocks.0.attn.hook_q",
        "blocks.0.attn.hook_z",
        "blocks.0.hook_attn_out",
        "blocks.1.hook_resid_post",
    }
    with torch.no_grad():
        logits, cache = other.run_with_cache(TOKENS, names_filter=lambda name: name in names)

        def normed(x):
            """A norm without weights, applied to a stream; RMS norms do not subtract the mean."""
            if kind in ("gpt2", "gpt_neox"):
                x = x - x.mean(-1, keepdim=True)
            return x / (x.pow(2).mean(-1, keepdim=True) + other.cfg.eps).sqrt()

        scale = math.sqrt(other.cfg.d_model) if kind == "gemma2" else 1.0
        # looked up by hand in the copy's embedding, which some engines have already scaled
        looked_up = other.W_E[TOKENS]
        embed = cache["hook_embed"]
        assert torch.allclose(embed, looked_up, **CLOSE) or torch.allclose(embed, looked_up * scale, **CLOSE)
        q = torch.einsum("bpm,hmd->bphd", normed(cache["blocks.0.hook_resid_pre"]), other.W_Q[0])
        torch.testing.assert_close(cache["blocks.0.attn.hook_q"], q, **CLOSE)
        if kind != "gemma2":
            # this model has a norm after attention
            out = torch.einsum("bphd,hdm->bpm", cache["blocks.0.attn.hook_z"], other.W_O[0])
            torch.testing.assert_close(cache["blocks.0.hook_attn_out"], out, **CLOSE)
        expected = normed(cache["blocks.1.hook_resid_post"]) @ other.W_U
        cap = getattr(other.cfg, "output_logits_soft_cap", None) or -1.0
        expected = cap * (expected / cap).tanh() if cap > 0 else expected
        torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_a_fresh_model(kind, trained):
    other = random_like(trained(kind), 0)
    scale, shift = final_affine(other)
    torch.testing.assert_close(scale, torch.ones_like(scale), atol=1e-5, rtol=0)
    torch.testing.assert_close(shift, torch.zeros_like(shift), atol=1e-5, rtol=0)
    with torch.no_grad():
        _, cache = other.run_with_cache(
            torch.arange(VOCAB)[None, :32], names_filter=lambda n: n == "hook_embed"
        )
        embedded = cache["hook_embed"]
        size = 0.02 * math.sqrt(other.cfg.d_model) if kind == "gemma2" else 0.02
        assert float(embedded.std()) == pytest.approx(size, rel=5 / math.sqrt(2 * embedded.numel()))
        for W in (other.W_U, other.W_Q[1], other.blocks[0].mlp.W_in):
            # for n draws: 5 standard errors
            assert float(W.std()) == pytest.approx(0.02, rel=5 / math.sqrt(2 * W.numel()))
            assert abs(float(W.mean())) < 5 * 0.02 / math.sqrt(W.numel())
        # GPT-2 divides by sqrt(2 x 2 layers)
        written = 0.01 if kind == "gpt2" else 0.02
        for W in (other.W_O[1], other.blocks[1].mlp.W_out):
            assert float(W.std()) == pytest.approx(written, rel=5 / math.sqrt(2 * W.numel()))


def test_the_seed_determines_the_weights(trained):
    model = trained("gpt2")
    one, same, other = (random_like(model, seed) for seed in (1, 1, 2))
    assert torch.equal(one.W_E, same.W_E)
    assert torch.equal(one.W_O, same.W_O)
    assert not torch.equal(one.W_E, other.W_E)
    assert not torch.equal(one.W_Q[0], one.W_Q[1])
    wide = random_like(model, 1, std=0.2)
    torch.testing.assert_close(wide.W_E, 10 * one.W_E)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_can_be_kept(kind, trained):
    model = trained(kind)
    other = random_like(model, 0, keep_embeddings=True)
    assert torch.equal(other.W_E, model.W_E)
    if kind == "gpt2":
        assert torch.equal(other.W_pos, model.W_pos)
        assert not torch.equal(random_like(model, 0).W_pos, model.W_pos)
    assert not torch.equal(other.W_Q, model.W_Q)
    tied = kind in ("gpt2", "gemma2")
    assert torch.equal(other.W_U, model.W_U) is tied


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_tied_unembedding_stays_tied(kind, trained):
    other = random_like(trained(kind), 0)
    if kind in ("gpt2", "gemma2"):
        # one of them may be scaled
        ratio = other.W_U.norm() / other.W_E.norm()
        torch.testing.assert_close(other.W_U, other.W_E.T * ratio, **CLOSE)
    else:
        assert float(torch.nn.functional.cosine_similarity(other.W_U.T, other.W_E).abs().mean()) < 0.3


def test_it_is_marked_as_random(trained):
    info = describe(random_like(trained("llama"), 7, keep_embeddings=True))
    assert info.name == "llama (random weights, seed 7, trained embeddings)"
    assert info.processing is False
    assert info.architecture == "LlamaForCausalLM"


def test_a_processed_model_gives_an_unprocessed_copy(tiny_directories):
    model = load_model(tiny_directories / "gpt2")
    other = random_like(model, 0)
    assert describe(other).processing is False
    with torch.no_grad():
        logits = other(TOKENS)
        # not centered: a random unembedding has a mean
        assert float(other.W_U.mean(-1).abs().max()) > 1e-3
        assert float(logits.mean(-1).abs().max()) > 1e-5
    scale, shift = final_affine(other)
    torch.testing.assert_close(scale, torch.ones_like(scale), atol=1e-5, rtol=0)
    assert float(shift.abs().max()) < 1e-5


def test_attention_only(tmp_path):
    write_toy(tmp_path)
    model = load_model(tmp_path, processing=False)
    other = random_like(model, 0)
    assert not torch.equal(other.W_Q, model.W_Q)
    with torch.no_grad():
        assert other(torch.arange(4)[None] % VOCAB).isfinite().all()


def test_invalid_input_is_refused(trained, tiny_directories):
    with pytest.raises(ValueError, match="embeddings of gpt2 are or may be processed"):
        random_like(load_model(tiny_directories / "gpt2"), 0, keep_embeddings=True)
    with pytest.raises(ValueError, match="std must be a finite number above 0, got 0"):
        random_like(trained("gpt2"), 0, std=0.0)
    with pytest.raises(ValueError, match=r"seed must be below 2\*\*64, got"):
        random_like(trained("gpt2"), 2**70)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_that_ran_with_gradients_can_be_copied(kind, trained):
    model = trained(kind)
    model(TOKENS)
    # a bridge's attention keeps its last pattern with its graph
    assert not torch.equal(random_like(model, 0).W_Q, model.W_Q)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_our_own_runs_with_gradients_leave_no_graph(kind, trained):
    model = trained(kind)
    given = model.W_E[TOKENS[0]].detach().clone()[None].requires_grad_()
    made = run_embedded(model, TOKENS[0], given, 0, "blocks.1.hook_resid_post")
    assert made.grad_fn is not None
    left = [
        name
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor) and value.grad_fn is not None
    ]
    assert left == []
