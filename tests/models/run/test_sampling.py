"""Generated text is sampled from the model's own full predictions."""

from __future__ import annotations

import pytest
import torch

from mechlens.models.load.loading import load_model
from mechlens.models.run.sampling import sample_tokens
from mechlens.text.tokens import drawable_tokens


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_follow_the_models_distribution(tiny_model, temperature) -> None:
    """The second token of many sequences, compared with the model's own logits."""
    n = 8000
    tokens = sample_tokens(tiny_model, batch=n, seq_len=2, temperature=temperature)
    assert tokens.shape == (n, 2)
    assert (tokens[:, 0] == tiny_model.tokenizer.bos_token_id).all()
    allowed = drawable_tokens(tiny_model.tokenizer, tiny_model.cfg.d_vocab)
    with torch.no_grad():
        logits = tiny_model(tokens[:1, :1])[0, 0, allowed]
    expected = (logits / temperature).softmax(-1)
    found = torch.bincount(tokens[:, 1], minlength=tiny_model.cfg.d_vocab)[allowed] / n
    # five standard errors of a share, and a few draws of improbable tokens
    assert ((found - expected).abs() < 5 * (expected / n).sqrt() + 5 / n).all()


def test_every_token_depends_on_those_before_it(tiny_directories) -> None:
    """At a temperature near 0, each token is the most likely one after the sequence so far."""
    model = load_model(tiny_directories / "llama")
    tokens = sample_tokens(model, batch=3, seq_len=12, temperature=1e-6, prepend_bos=False)
    allowed = drawable_tokens(model.tokenizer, model.cfg.d_vocab)
    with torch.no_grad():
        logits = model(tokens)[:, :-1, allowed]
    assert torch.equal(allowed[logits.argmax(-1)], tokens[:, 1:])
    assert len(tokens[:, 0].unique()) > 1, "the first token is drawn"
    assert len(tokens[:, 1:].unique()) > 8, "sequences that repeat themselves would tell little"


def test_special_and_padded_ids_are_never_drawn(tiny_bos_model) -> None:
    tokens = sample_tokens(tiny_bos_model, batch=80, seq_len=20, temperature=100.0)
    allowed = drawable_tokens(tiny_bos_model.tokenizer, tiny_bos_model.cfg.d_vocab)
    assert torch.isin(tokens[:, 1:], allowed).all()
    assert len(allowed) < tiny_bos_model.cfg.d_vocab
    # 1520 draws from a nearly uniform distribution over 59 ids
    assert len(tokens[:, 1:].unique()) == len(allowed)


def test_only_the_seed_matters(tiny_bos_model) -> None:
    first = sample_tokens(tiny_bos_model, batch=4, seq_len=10, seed=3)
    torch.manual_seed(5)
    assert torch.equal(sample_tokens(tiny_bos_model, batch=4, seq_len=10, seed=3), first)
    assert not torch.equal(sample_tokens(tiny_bos_model, batch=4, seq_len=10, seed=4), first)


def test_a_bfloat16_model_generates_text(tiny_directories) -> None:
    model = load_model(tiny_directories / "llama", dtype="bfloat16")
    tokens = sample_tokens(model, batch=2, seq_len=5)
    assert tokens.shape == (2, 5)
    assert tokens.dtype == torch.long


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"seq_len": 33}, "33 tokens do not fit into the model's context of 32"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_errors(tiny_bos_model, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        sample_tokens(tiny_bos_model, **{"batch": 2, "seq_len": 4, **options})
