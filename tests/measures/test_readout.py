"""The tiled readout compared with full distributions."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechlens.measures import readout, unembedding
from mechlens.measures.readout import kl_from, read_out
from mechlens.measures.unembedding import Unembedding
from tests.reference import vocabulary as reference


def drawn(rows, positions, d_model, d_vocab, seed=0):
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randn(rows, positions, d_model, generator=draw)
    W_U = torch.randn(d_model, d_vocab, generator=draw)
    b_U = torch.randn(d_vocab, generator=draw)
    targets = torch.randint(d_vocab, (positions, 2), generator=draw)
    return vectors, W_U, b_U, targets


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 5),
    positions=st.integers(1, 7),
    d_vocab=st.integers(2, 200),
    soft_cap=st.sampled_from([None, 2.0]),
    # one position at a time, some, all; one row next to the references, some, all
    budget=st.sampled_from([1, 300, 9000, 2**26]),
    at_once=st.sampled_from([1, 5, 1024]),
    # tokens per tile, in full groups and not
    columns=st.sampled_from([1, 64, 1024]),
    seed=st.integers(0, 2**31),
)
def test_every_statistic_matches_the_full_distribution(
    rows, positions, d_vocab, soft_cap, budget, at_once, columns, seed
):
    vectors, W_U, b_U, targets = drawn(rows, positions, 6, d_vocab, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unembedding, "TILE_COLUMNS", columns)
        patch.setattr(readout, "TILE_ROWS", at_once)
        found = read_out(
            vectors,
            Unembedding(W_U, b_U, soft_cap),
            targets=targets,
            references=(rows - 1, 0),
            top_k=2,
            memory_budget=budget,
        )
    logits = vectors.double() @ W_U.double() + b_U.double()
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    for row in range(rows):
        for pos in range(positions):
            top = int(logits[rows - 1, pos].argmax())
            for which, other in enumerate((rows - 1, 0)):
                for index, target in enumerate([top, *targets[pos].tolist()]):
                    expected = reference.statistics(logits[row, pos], logits[other, pos], target)
                    # float32 products of 6 terms, in logits of about 10
                    assert float(found.entropy[row, pos]) == pytest.approx(expected["entropy"], abs=2e-5)
                    assert float(found.kl[row, pos, which]) == pytest.approx(expected["kl"], abs=5e-5)
                    assert float(found.log_prob[row, pos, index]) == pytest.approx(
                        expected["log_prob"], abs=2e-5
                    )
                    near = (logits[row, pos] - logits[row, pos, target]).abs() < 2e-5
                    # logits that differ by less than rounding may be in any order
                    off = abs(expected["rank"] - int(found.rank[row, pos, index]))
                    assert off <= int(near.sum()) - 1
            best = logits[row, pos, found.top_ids[row, pos]]
            assert best.tolist() == pytest.approx(logits[row, pos].topk(2).values.tolist(), abs=2e-5)
            probability = float(expected["probabilities"][expected["order"][1]])
            assert float(found.top_probabilities[row, pos, 1]) == pytest.approx(probability, abs=1e-5)
    assert (found.kl >= 0).all()
    assert ((found.rank >= 1) & (found.rank <= d_vocab)).all()


def test_ranks_are_right_to_within_rounding_where_tokens_have_the_same_weights():
    """Many tokens are never trained. Which kernel computes their logits depends on the processor."""
    vectors, W_U, b_U, _ = drawn(3, 50, 64, 3000)
    W_U[:, ::7], b_U[::7] = W_U[:, :1], b_U[:1]
    found = read_out(
        vectors, Unembedding(W_U, b_U), targets=torch.full((50, 1), 1400), references=(2,), top_k=1
    )
    logits = vectors.double() @ W_U.double() + b_U.double()
    expected = 1 + (logits > logits[..., 1400, None] + 1e-4).sum(-1)
    near = ((logits - logits[..., 1400, None]).abs() < 1e-4).sum(-1)
    more = found.rank[..., 1] - expected
    assert (more >= 0).all()
    assert (more < near).all(), "a target is not larger than itself"


def test_unrequested_statistics_are_not_computed(monkeypatch):
    vectors, W_U, b_U, targets = drawn(4, 5, 6, 90)
    whole = read_out(vectors, Unembedding(W_U, b_U), targets=targets, references=(3, 0))
    passes = []
    for name in ("gt", "mul"):
        own = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, own=own, name=name, **k: passes.append(name) or own(*a, **k)
        )
    for statistics, expected in (((), set()), (("rank",), {"gt"}), (("kl",), {"mul"}), (("entropy",), set())):
        passes.clear()
        some = read_out(
            vectors, Unembedding(W_U, b_U), targets=targets, references=(3, 0), statistics=statistics
        )
        assert set(passes) == expected
        for name in readout.STATISTICS:
            value = getattr(some, name)
            if name in statistics:
                torch.testing.assert_close(value, getattr(whole, name))
            else:
                assert value is None
        assert torch.equal(some.top_ids, whole.top_ids)


def test_the_gradient_of_a_kl():
    vectors, W_U, b_U, _ = drawn(3, 4, 5, 30)
    reader = Unembedding(W_U, b_U, 3.0)
    streamed = kl_from(reader, vectors[0], vectors[1:])
    leaf = vectors[1:].clone().requires_grad_()
    with_gradient = kl_from(reader, vectors[0], leaf)
    torch.testing.assert_close(streamed, with_gradient.detach(), atol=1e-5, rtol=1e-5)
    with_gradient.sum().backward()
    step = 1e-2 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
    ahead, behind = (kl_from(reader, vectors[0], vectors[1:] + sign * step).sum() for sign in (1, -1))
    # a central difference, to third order in the step
    assert float((leaf.grad * step).sum()) == pytest.approx(float(ahead - behind) / 2, rel=5e-3)


def test_a_row_has_zero_kl_from_itself():
    vectors, W_U, b_U, targets = drawn(3, 4, 5, 30)
    found = read_out(vectors, Unembedding(W_U, b_U), targets=targets, references=(1,))
    # float32 numbers minus the same numbers
    assert found.kl[1, :, 0].max() < 1e-5
    assert (found.rank[1, :, 0] == 1).all()


def test_ties_count_strictly_larger_logits():
    W_U = torch.tensor([[3.0, 3.0, 1.0, 1.0]])
    found = read_out(
        torch.ones(2, 1, 1),
        Unembedding(W_U, torch.zeros(4)),
        targets=torch.tensor([[1, 2, 3]]),
        references=(0,),
        top_k=1,
    )
    assert found.rank[:, 0].tolist() == [[1, 1, 3, 3]] * 2


def test_a_constant_vector_is_uniform_and_minus_infinity_is_impossible():
    W_U, b_U = torch.zeros(2, 4), torch.tensor([0.0, 0.0, -math.inf, 0.0])
    targets = torch.tensor([[2]])
    found = read_out(torch.ones(1, 1, 2), Unembedding(W_U, b_U), targets=targets, references=(0,), top_k=1)
    assert float(found.entropy) == pytest.approx(math.log(3), abs=1e-6)
    assert float(found.kl[0, 0, 0]) == pytest.approx(0, abs=1e-6)
    assert float(found.log_prob[0, 0, 1]) == -math.inf
    assert int(found.rank[0, 0, 1]) == 4


def test_arguments_out_of_range_are_refused():
    vectors, W_U, b_U, targets = drawn(2, 2, 3, 5)
    alone = read_out(vectors, Unembedding(W_U, b_U), targets=targets, statistics=("rank",))
    assert alone.rank.shape == (2, 2, 2), "without a reference the targets are those that were given"
    for top_k in (0, 6):
        with pytest.raises(ValueError, match=f"vocabulary of 5, got {top_k}"):
            read_out(vectors, Unembedding(W_U, b_U), targets=targets, references=(0,), top_k=top_k)
    with pytest.raises(ValueError, match="memory_budget must be at least 1, got 0"):
        read_out(vectors, Unembedding(W_U, b_U), targets=targets, references=(0,), memory_budget=0)


def test_each_row_is_decoded_by_its_own_rule():
    vectors, W_U, b_U, targets = drawn(3, 4, 5, 30)
    shifts = torch.tensor([0.0, 1.0, -2.0])
    for chunk in (1, 2**20):
        found = read_out(
            vectors,
            Unembedding(W_U, b_U),
            targets=targets,
            references=(2, 0),
            decode=lambda row, some: some + shifts[row],
            memory_budget=chunk,
        )
        whole = read_out(
            vectors + shifts[:, None, None], Unembedding(W_U, b_U), targets=targets, references=(2, 0)
        )
        # the same product in matrices of other sizes
        assert torch.allclose(found.log_prob, whole.log_prob, atol=1e-5)
        assert torch.allclose(found.kl, whole.kl, atol=1e-5)
        assert torch.equal(found.top_ids, whole.top_ids)


SHORT_OF_MEMORY = """
import resource, torch
from mechlens.measures.readout import read_out
from mechlens.measures.unembedding import Unembedding

torch.set_num_threads(1)
d_vocab, rows, positions = 50000, 3, 600
draw = torch.Generator().manual_seed(0)
vectors = torch.randn(rows, positions, 4, generator=draw)
reader = Unembedding(torch.randn(4, d_vocab, generator=draw), torch.zeros(d_vocab))
options = {"targets": torch.zeros(positions, 1, dtype=torch.long), "references": (rows - 1, 0)}
small = read_out(vectors, reader, **options)
pages = int(open("/proc/self/statm").read().split()[0])
# the references' logits at all positions are 240 MB; what the process had mapped just then may be given back
# or used again, so the limit is taken down until it binds
for spare in range(100, -1000, -50):
    limit = pages * resource.getpagesize() + spare * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        torch.empty(2 * positions * d_vocab)
    except RuntimeError:
        break
else:
    raise SystemExit("the limit does not bind")
blocks = []
found = read_out(vectors, reader, **options, memory_budget=2**30, advance=blocks.append)
assert torch.equal(found.top_ids, small.top_ids)
assert torch.allclose(found.kl, small.kl, atol=1e-5)
assert sum(blocks) == positions
print("halved" if max(blocks) < positions else blocks)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's memory like this")
def test_positions_are_halved_when_their_references_do_not_fit():
    ran = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "halved", ran.stdout + ran.stderr


@pytest.mark.parametrize("columns", [1, 7, 1024])
@pytest.mark.parametrize("excluded", [False, True])
def test_the_mean_column_is_the_gradient_of_logsumexp(monkeypatch, columns, excluded):
    vectors, W_U, b_U, _ = drawn(1, 5, 6, 40)
    b_U[:8] -= torch.inf if excluded else 0
    # so far apart that some exponentials are subnormal in float32
    vectors = 20 * vectors[0]
    monkeypatch.setattr(unembedding, "TILE_COLUMNS", columns)
    column, log_total = Unembedding(W_U, b_U).expected_column(vectors)
    leaf = vectors.double().requires_grad_()
    expected = (leaf @ W_U.double() + b_U.double()).logsumexp(1)
    # float32 logits up to 200, of which probabilities are the exponentials
    assert torch.allclose(log_total, expected.detach(), atol=1e-4)
    assert torch.allclose(column.double(), torch.autograd.grad(expected.sum(), leaf)[0], atol=1e-4)
    with pytest.raises(ValueError, match="soft-cap"):
        Unembedding(W_U, b_U, 2.0).expected_column(vectors)
