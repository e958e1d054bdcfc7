"""The streaming readout against whole distributions."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    # one row beside the references, some of the rows, some of the positions, everything
    chunk=st.sampled_from([1, 300, 700, 2**20]),
    seed=st.integers(0, 2**31),
)
def test_every_statistic_equals_that_of_the_whole_distribution(
    rows, positions, d_vocab, soft_cap, chunk, seed
):
    vectors, W_U, b_U, targets = drawn(rows, positions, 6, d_vocab, seed)
    found = read_out(
        vectors,
        W_U,
        b_U,
        targets=targets,
        references=(rows - 1, 0),
        top_k=2,
        soft_cap=soft_cap,
        chunk_bytes=chunk,
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
    assert float(found.log_prob[0, 0, 1]) == -math.inf
    assert int(found.rank[0, 0, 1]) == 4


def test_bounds():
    vectors, W_U, b_U, targets = drawn(2, 2, 3, 5)
    with pytest.raises(ValueError, match="at least one reference row"):
        read_out(vectors, W_U, b_U, targets=targets, references=())
    for top_k in (0, 6):
        with pytest.raises(ValueError, match=f"vocabulary of 5, but is {top_k}"):
            read_out(vectors, W_U, b_U, targets=targets, references=(0,), top_k=top_k)
    with pytest.raises(ValueError, match="chunk_bytes must be at least 1, but is 0"):
        read_out(vectors, W_U, b_U, targets=targets, references=(0,), chunk_bytes=0)


def test_each_row_is_decoded_by_its_own_rule():
    vectors, W_U, b_U, targets = drawn(3, 4, 5, 30)
    shifts = torch.tensor([0.0, 1.0, -2.0])
    for chunk in (1, 2**20):
        found = read_out(
            vectors,
            W_U,
            b_U,
            targets=targets,
            references=(2, 0),
            decode=lambda row, some: some + shifts[row],
            chunk_bytes=chunk,
        )
        whole = read_out(vectors + shifts[:, None, None], W_U, b_U, targets=targets, references=(2, 0))
        # the same product in matrices of other sizes
        assert torch.allclose(found.log_prob, whole.log_prob, atol=1e-5)
        assert torch.allclose(found.kl, whole.kl, atol=1e-5)
        assert torch.equal(found.top_ids, whole.top_ids)


SHORT_OF_MEMORY = """
import resource, torch
from mechlens.measures.vocabulary import read_out

torch.set_num_threads(1)
d_vocab, rows, positions = 50000, 20, 100
draw = torch.Generator().manual_seed(0)
vectors = torch.randn(rows, positions, 4, generator=draw)
W_U, b_U = torch.randn(4, d_vocab, generator=draw), torch.zeros(d_vocab)
options = {"targets": torch.zeros(positions, 1, dtype=torch.long), "references": (rows - 1, 0)}
small = read_out(vectors, W_U, b_U, **options)
pages = int(open("/proc/self/statm").read().split()[0])
# all logits at once are 400 MB; what the process had mapped just then may be given back or used again, so the
# limit is taken down until it binds
for spare in range(100, -1000, -100):
    limit = pages * resource.getpagesize() + spare * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        torch.empty(rows * positions * d_vocab)
    except RuntimeError:
        break
else:
    raise SystemExit("the limit does not bind")
found = read_out(vectors, W_U, b_U, **options, chunk_bytes=2**30)
assert torch.equal(found.top_ids, small.top_ids)
assert torch.allclose(found.kl, small.kl, atol=1e-5)
print("halved")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's memory like this")
def test_a_chunk_that_does_not_fit_is_halved():
    ran = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "halved", ran.stderr
