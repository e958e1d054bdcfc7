"""Arguments of several types are converted or refused, with an error that names the argument."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from mechlens import Mean, Patching, detect_heads, repeated_tokens
from mechlens.arguments import chosen, generator_of, names_of, seeds_of, whole_number
from mechlens.results import parse_heads
from mechlens.text.corpus import corpus_ids
from tests.examples import head_scores


@pytest.mark.parametrize("seeds", [[3, 0], (3, 0), np.array([3, 0]), torch.tensor([3, 0]), iter([3, 0])])
def test_seeds_may_be_any_iterable_of_integers(seeds):
    found = seeds_of(seeds)
    assert found == (3, 0)
    assert all(type(seed) is int for seed in found), "results save plain ints"


@pytest.mark.parametrize(
    ("seeds", "error", "message"),
    [
        (0, TypeError, r"seeds must be a list of integers such as range\(5\) or \[0\], got 0"),
        ("01", TypeError, "seeds must be a list of integers"),
        ([0.5], TypeError, "each seed must be an integer, got 0.5"),
        ([True], TypeError, "each seed must be an integer, got True"),
        ([-1], ValueError, "each seed must be at least 0, got -1"),
        ([], ValueError, "seeds must be a list of at least one integer"),
        ([0, 0], ValueError, "seeds must be distinct"),
    ],
)
def test_invalid_seeds_are_refused(seeds, error, message):
    with pytest.raises(error, match=message):
        seeds_of(seeds)


def test_a_numpy_seed_draws_the_same_as_an_int():
    draws = [torch.rand(3, generator=generator_of(seed), dtype=torch.float32) for seed in (7, np.int64(7))]
    assert torch.equal(*draws)


@pytest.mark.parametrize("value", [2.5, "2", True, np.float32(2), None, torch.tensor([1, 2])])
def test_a_size_that_is_not_an_integer_is_refused(bundled, value):
    with pytest.raises(TypeError, match="batch must be an integer, got"):
        repeated_tokens.__wrapped__(bundled, batch=value)


@pytest.mark.parametrize("value", [2, np.int32(2), torch.tensor(2), np.array(2)])
def test_integers_of_all_types_become_ints(value):
    assert type(whole_number("batch", value)) is int


@pytest.mark.parametrize(
    "layers", [[0, 2], (0, -2), np.array([0, 2]), np.array([True, False, True, False]), torch.tensor([0, 2])]
)
def test_layers_may_be_integers_or_a_mask(layers):
    assert chosen("layer", layers, 4) == (0, 2)


def test_a_string_is_one_name_and_an_unknown_name_suggests_a_known_one():
    assert names_of("kind", "abc", ("abc", "d")) == ("abc",)
    with pytest.raises(ValueError, match=r"unknown kind 'abd' \(did you mean abc\?\): choose from abc, d"):
        names_of("kind", "abd", ("abc", "d"))
    with pytest.raises(TypeError, match=r"kinds must be a list of names such as \['abc'\], got 3"):
        names_of("kind", 3, ("abc", "d"))


@pytest.mark.parametrize("heads", ["L1H2", ["L1H2"], (1, 2), [(1, 2)], ["1.2"]])
def test_a_single_head_is_a_list_of_one(heads):
    assert parse_heads(heads) == [(1, 2)]


@pytest.mark.parametrize("threshold", [2, -1.5])
def test_thresholds_outside_the_range_of_scores_are_refused(threshold):
    with pytest.raises(ValueError, match=f"threshold must be between -1 and 1, got {threshold}"):
        detect_heads(head_scores(), "induction_score", threshold=threshold)


def mean(tokens: object) -> Mean:
    """Make a Mean without the tests' type checks."""
    made = object.__new__(Mean)
    inspect.unwrap(Mean.__init__)(made, tokens)
    return made


@pytest.mark.parametrize("given", [np.array([[5, 6]]), [[5, 6]], BatchEncoding({"input_ids": [[5, 6]]})])
def test_token_ids_may_be_arrays_lists_or_encodings(given):
    assert corpus_ids(given).tolist() == [[5, 6]]
    assert mean(given).reference.tolist() == [[5, 6]]


def test_references_with_padding_are_refused():
    padded = BatchEncoding({"input_ids": [[5, 6], [7, 0]], "attention_mask": [[1, 1], [1, 0]]})
    with pytest.raises(ValueError, match=r"Mean takes token ids .* but these have padding"):
        mean(padded)


def test_a_mean_of_an_array_equals_the_mean_of_a_tensor(bundled):
    prompt, others = torch.tensor([[0, 311, 290]]), torch.tensor([[0, 402, 287], [0, 311, 287]])
    grids = [
        Patching(bundled, prompt).grid("z", values=mean(given), layers=[1]).effect
        for given in (others, others.numpy())
    ]
    assert torch.allclose(*grids, atol=1e-6)
