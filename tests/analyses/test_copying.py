"""Copy scores: against a loop over tokens and heads, and in models whose heads are known."""

from __future__ import annotations

import pytest
import torch
from transformers import OlmoeConfig

import mechlens
from mechlens.models.load.tiny_architectures import architecture, random_model, write_model, write_tokenizer
from mechlens.models.weights.folding import effective_embeddings
from mechlens.results.copying import SHARES
from mechlens.show.section import section
from tests.examples import copy_scores as example
from tests.reference.matching import best_key
from tests.shared import BACKENDS, needs_smollm2
from tests.tiny_models import write_model_of
from tests.written_models import load_written


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama"])
def test_scores_are_those_of_a_loop_over_tokens_and_heads(kind, backend, load_once, tiny_directories):
    model = load_once(tiny_directories / kind, backend=backend, processing=True)
    ids = torch.tensor([7, 11, 20, 33])
    found = mechlens.copy_scores(model, ids, top_k=6)
    with torch.no_grad():
        for layer in range(model.cfg.n_layers):
            W_V, W_O = model.W_V[layer], model.W_O[layer]
            shared = model.cfg.n_heads // len(W_V)
            for head in range(model.cfg.n_heads):
                raised = lowered = 0
                for token in ids.tolist():
                    x = model.W_E[token]
                    block = model.blocks[0]
                    mlp_in = block.ln2(x[None, None])
                    x = x + block.mlp(mlp_in)[0, 0]
                    logits = x @ W_V[head // shared] @ W_O[head] @ model.W_U
                    raised += int((logits > logits[token]).sum()) < 6
                    lowered += int((logits < logits[token]).sum()) < 6
                assert float(found.copies[layer, head]) == raised / 4
                assert float(found.suppresses[layer, head]) == lowered / 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "gemma2", "qwen3"])
def test_a_token_is_looked_up_as_the_engine_does(kind, backend, load_once, tiny_directories, tmp_path):
    if kind == "qwen3":  # it normalizes queries and keys
        write_model(tmp_path, random_model(architecture("Qwen3").config()))
        write_tokenizer(tmp_path)
        model = mechlens.load_model(tmp_path, backend=backend)
    else:
        model = load_once(tiny_directories / kind, backend=backend, processing=True)
    ids = [7, 11, 20, 33, 11]
    found = mechlens.copy_scores(model, torch.tensor(ids))
    found_share = {"own": found.attends_to_predicted, "other": found.null_attends_to_predicted}
    with torch.no_grad():
        keys = effective_embeddings(model, torch.tensor(ids))[:4]
        for layer in range(model.cfg.n_layers):
            for head in range(model.cfg.n_heads):
                best = [ids[best_key(model, layer, head, model.W_U[:, token], keys)] for token in ids]
                for which, wanted in (("own", ids), ("other", [ids[-1], *ids[:-1]])):
                    share = sum(a == b for a, b in zip(best, wanted, strict=True)) / 5
                    assert float(found_share[which][layer, head]) == pytest.approx(share), (layer, head)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_across_heads_leave_what_is_looked_up_undefined(backend, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}
    config = OlmoeConfig(vocab_size=64, max_position_embeddings=64, pad_token_id=None, **sizes, **experts)
    write_model_of(tmp_path, config)
    found = mechlens.copy_scores(mechlens.load_model(tmp_path, backend=backend), torch.tensor([7, 11, 20]))
    assert found.attends_to_predicted.isnan().all()
    assert found.null_attends_to_predicted.isnan().all()
    assert not found.copies.isnan().any()


def test_processing_changes_no_score(load_once, tiny_directories):
    ids = torch.arange(4, 40)
    folded, raw = (
        mechlens.copy_scores(load_once(tiny_directories / "gpt2", processing=processing), ids)
        for processing in (True, False)
    )
    for name in SHARES:
        # a near tie may be decided by rounding
        assert torch.allclose(getattr(folded, name), getattr(raw, name), atol=1 / 36 + 1e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_all_tokens_share_predicts_none(backend, tiny_directories):
    model = mechlens.load_model(tiny_directories / "llama", backend=backend, processing=False)
    ids = torch.arange(4, 40)
    before = mechlens.copy_scores(model, ids).attends_to_predicted
    with torch.no_grad():
        model.W_U.add_(torch.linspace(-1, 1, model.cfg.d_model)[:, None])
    after = mechlens.copy_scores(model, ids).attends_to_predicted
    # a near tie may be decided by rounding
    assert torch.allclose(before, after, atol=1 / 36 + 1e-6)


def test_a_head_that_copies_and_one_that_takes_back_are_told_apart(tmp_path):
    found = mechlens.copy_scores(load_written(tmp_path, "negative"), ["a", "b"], top_k=1)
    assert (float(found.copies[0, 0]), float(found.suppresses[0, 0])) == (1, 0)
    assert (float(found.copies[0, 1]), float(found.suppresses[0, 1])) == (0, 1)
    assert float(found.null_copies[0, 0]) == 0
    # where what is not raised is all the same, as here, everything else is among the smallest
    assert float(found.null_suppresses[0, 0]) == 1
    # they attend by position alone, so all keys match equally and none best
    assert found.attends_to_predicted[0].tolist() == [0, 0]


def test_what_are_no_tokens_is_refused(bundled):
    with pytest.raises(ValueError, match="tokens must be at least two single tokens"):
        mechlens.copy_scores(bundled, [" sea"])
    with pytest.raises(ValueError, match="tokens must be a list of single tokens, got ' sea'"):
        mechlens.copy_scores(bundled, " sea")
    with pytest.raises(ValueError, match="not one"):
        mechlens.copy_scores(bundled, [" sea", " two words"])


def test_the_heads_that_copy_or_suppress_most_come_first():
    assert list(example().summary()["label"]) == ["L0H0", "L0H1"]
    assert list(example().summary()["attends_to_predicted"]) == [0.5, 1]
    assert "for 2 tokens: a head copies a token if" in section(example()).text


@needs_smollm2
def test_the_real_model_has_heads_that_copy_names_which_others_do_not(load_once):
    found = mechlens.copy_scores(load_once("smollm2-135m"))
    assert len(found.ids) >= 20
    assert float(found.copies.max()) > 0.9
    assert float(found.copies.mean()) < 0.3
    assert float(found.null_copies.mean()) < float(found.copies.mean())
    assert float(found.suppresses[23, 3]) > 0.9 > 0.1 > float(found.null_suppresses[23, 3])
    looked_up = found.attends_to_predicted
    # one head does copy suppression; the other negative one suppresses whatever it attends to
    assert (looked_up > 0.5).nonzero().tolist() == [[24, 4]]
    assert float(found.suppresses[24, 4]) > 0.9 > 0.1 > float(found.null_attends_to_predicted[24, 4])
    assert float(looked_up[23, 3]) < 0.3
