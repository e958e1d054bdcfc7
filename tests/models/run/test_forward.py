"""Runs return the engine's own activations and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from mechlens.measures.unembedding import Unembedding
from mechlens.models.load.loading import load_model
from mechlens.models.run.forward import read_patterns, watch
from mechlens.models.run.unembedding import check_streamed, next_token_log_probs
from mechlens.models.weights.access import direct_unembedding, final_norm_scale, per_query_head, reading_bias
from tests.close import assert_close
from tests.reference import heads as reference
from tests.tiny_models import write_model_of, write_tiny_model


def tokens_for(model, length=20, batch=3):
    draw = torch.Generator().manual_seed(0)
    return torch.randint(4, 50, (batch, length), generator=draw)


def hooks_left(model) -> list[str]:
    return [name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]


def test_patterns_are_the_engines_own(tiny_model):
    tokens = tokens_for(tiny_model)
    _, cache = tiny_model.run_with_cache(tokens)
    seen = {}
    read_patterns(tiny_model, tokens, lambda layer, pattern: seen.update({layer: pattern.clone()}))
    assert list(seen) == list(range(tiny_model.cfg.n_layers))
    for layer, pattern in seen.items():
        expected = cache[f"blocks.{layer}.attn.hook_pattern"]
        # the same operations on the same numbers
        assert torch.allclose(pattern, expected, atol=1e-7)


def test_log_probs_match_the_full_logits(tiny_model):
    tokens = tokens_for(tiny_model)
    log_prob, correct = next_token_log_probs(tiny_model, tokens)
    with torch.no_grad():
        logits = tiny_model(tokens)
    for row in range(len(tokens)):
        expected, right = reference.log_probs(logits[row], tokens[row])
        # float32 log probabilities of random models, down to -40 nats
        assert log_prob[row, :-1].tolist() == pytest.approx(expected, abs=2e-5)
        assert correct[row, :-1].tolist() == right
    assert log_prob[:, -1].isnan().all()
    assert not correct[:, -1].any()


def test_logits_that_are_not_just_norm_and_unembedding_are_refused(tmp_path):
    """Granite divides its logits by a constant, which only the model itself knows."""
    granite = pytest.importorskip("transformers").GraniteConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=64,
        max_position_embeddings=32,
        logits_scaling=8.0,
    )
    write_model_of(tmp_path, granite)
    model = load_model(tmp_path, backend="bridge")
    tokens = tokens_for(model)
    log_prob, _ = next_token_log_probs(model, tokens)
    with torch.no_grad():
        logits = model(tokens)
    expected, _ = reference.log_probs(logits[0], tokens[0])
    assert log_prob[0, :-1].tolist() == pytest.approx(expected, abs=2e-5)
    # a single token shows it, too
    with pytest.raises(ValueError, match="logits are not its last norm"):
        check_streamed(model, tokens[:1, :1])


def test_broken_weights_do_not_count_against_the_readout(tmp_path):
    write_tiny_model(tmp_path, "gpt2")
    model = load_model(tmp_path)
    with torch.no_grad():
        model.b_U[:] = torch.nan
    check_streamed(model, tokens_for(model))


def test_a_bfloat16_model_is_read_out_in_float32():
    """Rounded logits tie, and the second most likely token would count as the first."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(100, 64, generator=draw).bfloat16()
    W_U = torch.randn(64, 5000, generator=draw).bfloat16()
    wide = vectors.double() @ W_U.double()
    second = wide.topk(2).indices[:, 1]
    log_prob, first = Unembedding(W_U, torch.zeros(5000).bfloat16()).log_prob(vectors, second)
    assert not first.any()
    expected = wide.log_softmax(1).gather(1, second[:, None])[:, 0]
    # float32 sums of 64 terms
    assert torch.allclose(log_prob.double(), expected, atol=1e-4)


def test_dropout_is_off_while_a_model_is_watched(tmp_path):
    """Dropout of a half would change every activation; a bridge also has it in the wrapped model."""
    write_tiny_model(tmp_path / "gpt2", "gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model = load_model(tmp_path / "gpt2")
    tokens, seen = tokens_for(model), []
    reader = {"blocks.1.hook_resid_post": seen.append}
    watch(model, tokens, reader)
    model.train()
    watch(model, tokens, reader)
    assert_close(*seen)
    assert model.training, "and on again afterwards"


def test_parts_give_the_same_as_the_whole(tiny_model, monkeypatch):
    tokens = tokens_for(tiny_model, batch=5)
    whole = next_token_log_probs(tiny_model, tokens)
    monkeypatch.setattr("mechlens.models.run.forward.MAX_POSITIONS", 2 * tokens.shape[1])
    monkeypatch.setattr("mechlens.measures.unembedding.TILE_COLUMNS", 3)
    in_parts = next_token_log_probs(tiny_model, tokens)
    # other batch sizes sum in a different order
    assert torch.allclose(whole[0], in_parts[0], atol=2e-5, equal_nan=True)
    assert torch.equal(whole[1], in_parts[1])


def test_the_run_ends_with_the_last_reader(tiny_model):
    """Layer 1 is never computed when only layer 0 is read."""
    reached = []
    with tiny_model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda value, hook: reached.append(1))]):
        watch(tiny_model, tokens_for(tiny_model), {"blocks.0.attn.hook_pattern": lambda pattern: None})
    assert not reached


def test_no_hook_is_left_behind_after_an_exception(tiny_model):
    before = hooks_left(tiny_model)

    def fail(pattern):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        watch(tiny_model, tokens_for(tiny_model), {"blocks.0.attn.hook_pattern": fail})
    assert hooks_left(tiny_model) == before == []
    watch(tiny_model, tokens_for(tiny_model), {"blocks.0.attn.hook_pattern": lambda pattern: None})
    assert hooks_left(tiny_model) == []


def test_a_users_own_hooks_stay(tiny_model):
    calls = []
    tiny_model.hook_dict["blocks.0.hook_resid_pre"].add_hook(lambda value, hook: calls.append(1), level=None)
    try:
        watch(tiny_model, tokens_for(tiny_model), {"blocks.0.attn.hook_pattern": lambda pattern: None})
        assert calls
        assert hooks_left(tiny_model), "the user's hook must still be there"
    finally:
        tiny_model.reset_hooks()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
        (torch.tensor([[1, 64]]), "token id 64 is not in the model's vocabulary of 64"),
        (torch.tensor([[-1, 3]]), "token id -1 is not in"),
        (torch.ones(1, 33, dtype=torch.long), "33 tokens do not fit into the model's context of 32"),
    ],
)
def test_invalid_tokens_are_refused(tiny_model, tokens, message):
    with pytest.raises(ValueError, match=message):
        watch(tiny_model, tokens, {"blocks.0.attn.hook_pattern": lambda pattern: None})


def test_an_unknown_hook_point_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"no hook point 'blocks\.9\.attn\.hook_pattern'"):
        watch(tiny_model, tokens_for(tiny_model), {"blocks.9.attn.hook_pattern": lambda pattern: None})


def test_direct_unembedding_gives_a_directions_effect_on_the_logits(tiny_model):
    """Logit differences through the model's own norm and unembedding, at a fixed scale."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(tiny_model.cfg.d_model, generator=draw) * 100  # so that eps is negligible
    with torch.no_grad():
        normed = tiny_model.ln_final(x[None, None])[0, 0] - tiny_model.ln_final(-x[None, None])[0, 0]
        expected = normed / 2 @ tiny_model.W_U
    if tiny_model.cfg.normalization_type.startswith("LN"):
        scale = (x - x.mean()).pow(2).mean().sqrt()
    else:
        scale = x.pow(2).mean().sqrt()
    got = x @ direct_unembedding(tiny_model) / scale
    # float32 sums over d_model = 32 of terms of size 1
    assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "name", "offset"),
    [
        ("gpt2", "transformer.ln_f.weight", 0),
        ("gpt_neox", "gpt_neox.final_layer_norm.weight", 0),
        ("llama", "model.norm.weight", 0),
        ("gemma2", "model.norm.weight", 1),  # Gemma stores its scales minus 1
    ],
)
def test_the_final_scale_matches_the_files(tiny_directories, kind, name, offset):
    stored = load_file(tiny_directories / kind / "model.safetensors")[name] + offset
    scale = final_norm_scale(load_model(tiny_directories / kind, processing=False))
    # eps = 1e-5 relative to a variance of 1, and float32
    assert torch.allclose(scale, stored, atol=1e-4)
    folded = final_norm_scale(load_model(tiny_directories / kind, processing=True))
    if kind != "gemma2":  # whether processing folds Gemma's norms depends on the engine
        assert torch.allclose(folded, torch.ones_like(folded), atol=1e-4)


def test_values_and_their_biases_are_per_query_head(tiny_model):
    kept = []
    watch(tiny_model, tokens_for(tiny_model), {"blocks.0.attn.hook_v": kept.append})
    v = per_query_head(kept[0], tiny_model.cfg.n_heads)
    assert v.shape[-2:] == (tiny_model.cfg.n_heads, tiny_model.cfg.d_head)
    shared = tiny_model.cfg.n_heads // kept[0].shape[-2]
    for head in range(tiny_model.cfg.n_heads):
        assert torch.equal(v[..., head, :], kept[0][..., head // shared, :])
    assert reading_bias(tiny_model, 0, "V").shape == (tiny_model.cfg.n_heads, tiny_model.cfg.d_head)
