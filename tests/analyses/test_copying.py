"""Copy scores: against a loop over tokens and heads, and in models whose heads are known."""

from __future__ import annotations

import pytest
import torch

import mechlens
from mechlens.show.section import section
from tests.examples import copy_scores as example
from tests.shared import BACKENDS, needs_smollm2
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


def test_a_head_that_copies_and_one_that_takes_back_are_told_apart(tmp_path):
    found = mechlens.copy_scores(load_written(tmp_path, "negative"), ["a", "b"], top_k=1)
    assert (float(found.copies[0, 0]), float(found.suppresses[0, 0])) == (1, 0)
    assert (float(found.copies[0, 1]), float(found.suppresses[0, 1])) == (0, 1)
    assert float(found.null_copies[0, 0]) == 0
    # where what is not raised is all the same, as here, everything else is among the smallest
    assert float(found.null_suppresses[0, 0]) == 1


def test_what_are_no_tokens_is_refused(bundled):
    with pytest.raises(ValueError, match="tokens must be at least two single tokens"):
        mechlens.copy_scores(bundled, [" sea"])
    with pytest.raises(ValueError, match="tokens must be a list of single tokens, got ' sea'"):
        mechlens.copy_scores(bundled, " sea")
    with pytest.raises(ValueError, match="not one"):
        mechlens.copy_scores(bundled, [" sea", " two words"])


def test_the_heads_that_copy_or_suppress_most_come_first():
    assert list(example().summary()["label"]) == ["L0H0", "L0H1"]
    assert "for 2 tokens: a head copies a token if" in section(example()).text


@needs_smollm2
def test_the_real_model_has_heads_that_copy_names_which_others_do_not(load_once):
    found = mechlens.copy_scores(load_once("smollm2-135m"))
    assert len(found.ids) >= 20
    assert float(found.copies.max()) > 0.9
    assert float(found.copies.mean()) < 0.3
    assert float(found.null_copies.mean()) < float(found.copies.mean())
    assert float(found.suppresses[23, 3]) > 0.9 > 0.1 > float(found.null_suppresses[23, 3])
