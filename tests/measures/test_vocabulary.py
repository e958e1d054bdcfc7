"""The streaming readout against whole distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlens.measures import vocabulary
from mechlens.measures.vocabulary import read_out
from tests.reference import vocabulary as reference


def drawn(rows, positions, d_model, d_vocab, seed=0):
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, positions, d_model, generator=draw)
    W_U = torch.randn(d_model, d_vocab, generator=draw)
    b_U = torch.randn(d_vocab, generator=draw)
    targets = torch.randint(d_vocab, (positions, 2), generator=draw)
    return vectors, W_U, b_U, targets


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 5),
    positions=st.integers(1, 7),
    d_vocab=st.integers(2, 40),
    soft_cap=st.sampled_from([None, 2.0]),
    chunk=st.sampled_from([1, 700, 2**20]),
    seed=st.integers(0, 2**31),
)
def test_every_statistic_equals_that_of_the_whole_distribution(
    rows, positions, d_vocab, soft_cap, chunk, seed
):
    vectors, W_U, b_U, targets = drawn(rows, positions, 6, d_vocab, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "CHUNK_BYTES", chunk)
        found = read_out(
            vectors, W_U, b_U, targets=targets, references=(rows - 1, 0), top_k=2, soft_cap=soft_cap
        )
    logits = vectors @ W_U + b_U
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    for row in range(rows):
        for pos in range(positions):
            top = int(logits[rows - 1, pos].argmax())
            for which, other in enumerate((rows - 1, 0)):
                for index, target in enumerate([top, *targets[pos].tolist()]):
                    expected = reference.statistics(logits[row, pos], logits[other, pos], target)
                    # float32 sums over at most 40 tokens with logits of about 10
                    assert float(found.entropy[row, pos]) == pytest.approx(expected["entropy"], abs=2e-5)
                    assert float(found.kl[which, row, pos]) == pytest.approx(expected["kl"], abs=5e-5)
                    assert float(found.log_prob[row, pos, index]) == pytest.approx(
                        expected["log_prob"], abs=2e-5
                    )
                    near = expected["rank"] - int(found.rank[row, pos, index])
                    # the reference's product may order two logits that differ by rounding otherwise
                    assert abs(near) <= 1
            assert found.top_ids[row, pos, 0] == expected["order"][0]
            probability = float(expected["probabilities"][expected["order"][1]])
            assert float(found.top_probabilities[row, pos, 1]) == pytest.approx(probability, abs=1e-5)
    assert (found.kl >= 0).all()
    assert ((found.rank >= 1) & (found.rank <= d_vocab)).all()


def test_a_row_is_at_no_distance_from_itself():
    vectors, W_U, b_U, targets = drawn(3, 4, 5, 30)
    found = read_out(vectors, W_U, b_U, targets=targets, references=(1,))
    # the same numbers in float32, less the same numbers
    assert found.kl[0, 1].max() < 1e-5
    assert (found.rank[1, :, 0] == 1).all()


def test_ties_count_strictly_larger_logits():
    W_U = torch.tensor([[3.0, 3.0, 1.0, 1.0]])
    found = read_out(
        torch.ones(1, 1, 1), W_U, torch.zeros(4), targets=torch.tensor([[1, 2, 3]]), references=(0,), top_k=1
    )
    assert found.rank[0, 0].tolist() == [1, 1, 3, 3]


def test_a_constant_vector_is_even_and_minus_infinity_is_impossible():
    W_U, b_U = torch.zeros(2, 4), torch.tensor([0.0, 0.0, -math.inf, 0.0])
    targets = torch.tensor([[2]])
    found = read_out(torch.ones(1, 1, 2), W_U, b_U, targets=targets, references=(0,), top_k=1)
    assert float(found.entropy) == pytest.approx(math.log(3), abs=1e-6)
    assert float(found.kl) == pytest.approx(0, abs=1e-6)
    assert float(found.log_prob[0, 0, 1].exp()) == 0
    assert int(found.rank[0, 0, 1]) == 4


def test_bounds():
    vectors, W_U, b_U, targets = drawn(2, 2, 3, 5)
    with pytest.raises(ValueError, match="at least one reference row"):
        read_out(vectors, W_U, b_U, targets=targets, references=())
    for top_k in (0, 6):
        with pytest.raises(ValueError, match=f"vocabulary of 5, but is {top_k}"):
            read_out(vectors, W_U, b_U, targets=targets, references=(0,), top_k=top_k)
