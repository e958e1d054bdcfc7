"""Successor scores: against a loop over tokens and heads, and in a model whose heads are known."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save_file

import mechlens
from mechlens.show.section import section
from mechlens.text.successions import SUCCESSIONS
from tests.close import assert_close
from tests.examples import successor_scores as example
from tests.reference.succession import successor_shares
from tests.shared import BACKENDS, needs_smollm2
from tests.tiny_models import write_toy


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama"])
def test_scores_are_those_of_a_loop_over_tokens_and_heads(kind, backend, load_once, tiny_directories):
    model = load_once(tiny_directories / kind, backend=backend, processing=True)
    classes = {"cycle": [7, 11, 20, 33, 7], "row": [40, 3, 9]}
    found = mechlens.successor_scores(model, {name: torch.tensor(ids) for name, ids in classes.items()})
    assert found.sizes == (4, 2)
    assert found.ids.tolist() == [7, 11, 20, 33, 40, 3]
    assert found.successor_ids.tolist() == [11, 20, 33, 7, 3, 9]
    with torch.no_grad():
        for layer in range(model.cfg.n_layers):
            for head in range(model.cfg.n_heads):
                place = (slice(None), layer, head)
                shares = [
                    successor_shares(model, layer, head, set(ids), dict(itertools.pairwise(ids)))
                    for ids in classes.values()
                ]
                expected = torch.tensor(shares)
                assert_close(torch.stack([found.by_class[place], found.null_by_class[place]], 1), expected)
                whole = torch.stack([found.scores[layer, head], found.nulls[layer, head]])
                assert_close(whole, (4 * expected[0] + 2 * expected[1]) / 6)


def test_a_head_that_increments_is_told_apart_from_one_that_copies(tmp_path):
    """Token i is dimension i of the stream, and its logit is dimension 16 + i."""
    weights = write_toy(tmp_path, n_layers=1, d_head=16, n_heads=3, normalization_type=None)
    for name, each in weights.items():
        if "attn" in name or "embed" in name:
            each.zero_()
    weights["embed.W_E"][:16, :16] = torch.eye(16)
    weights["unembed.W_U"][16:, :16] = torch.eye(16)
    weights["blocks.0.attn.W_V"][:, :16] = torch.eye(16)
    weights["blocks.0.attn.W_O"][0, :, 16:] = torch.eye(16).roll(1, 1)
    weights["blocks.0.attn.W_O"][1, :, 16:] = torch.eye(16)
    save_file(weights, tmp_path / "model.safetensors")
    model = mechlens.load_model(tmp_path)
    found = mechlens.successor_scores(model, {"row": torch.arange(5)})
    # the third head writes nothing, so that no logit is the largest
    assert found.scores.tolist() == [[1, 0, 0]]
    # for all but the first token the copied one is the successor of one of the three others
    assert_close(found.nulls, torch.tensor([[0, 1 / 4, 0]]))


def test_built_in_classes_are_what_the_model_has_as_single_tokens(bundled):
    found = mechlens.successor_scores(bundled)
    assert found.classes == ("number words", "letters")
    assert found.strings[:5] == (" one", " two", " three", " four", " five")
    # it has no Q, X or Z
    pairs = list(zip(found.strings[5:], found.successor_strings[5:], strict=True))
    assert (" P", " Q") not in pairs
    assert (" R", " S") in pairs
    assert found.sizes == (5, 20)


def test_days_and_months_are_cycles():
    assert SUCCESSIONS["days"][-2:] == (" Sunday", " Monday")
    assert SUCCESSIONS["abbreviated months"][-2:] == (" Dec", " Jan")
    assert SUCCESSIONS["letters"][-1] == " Z"
    assert len(SUCCESSIONS["numerals"]) == 200


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"x": [" the", " of"]}, "classes must be three or more tokens each"),
        ({"x": [" the", " of", " and", " of"]}, "classes must be three or more tokens each"),
        ({"x": " the"}, "classes must be a list of single tokens, got ' the'"),
        ({"x": [" the", " of", " two words"]}, "not one"),
        ({}, "no class has two tokens with their successors"),
    ],
)
def test_what_is_no_class_is_refused(bundled, classes, message):
    with pytest.raises(ValueError, match=message):
        mechlens.successor_scores(bundled, classes)


def test_the_heads_that_succeed_most_come_first():
    found = example()
    assert list(found.summary()["label"]) == ["L0H1", "L0H0"]
    assert_close(found.scores, torch.tensor([[0.0, 0.8]]))
    assert found.to_dataframe()["big_letters"].tolist() == [0, 0.5]
    assert "for 5 tokens with a successor, of these classes: days (3), big letters (2)" in section(found).text


@needs_smollm2
def test_the_real_model_has_no_successor_head_by_its_weights(load_once):
    found = mechlens.successor_scores(load_once("smollm2-135m"))
    # its numerals are tokens without a space
    assert found.classes[:2] == ("number words", "ordinal words")
    assert float(found.scores.max()) < 0.2
    assert float((found.scores - found.nulls).mean().abs()) < 0.02
