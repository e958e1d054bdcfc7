"""Measures of thin factors compared with full float64 matrices."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mechlens.measures import weights
from mechlens.measures.weights import (
    column,
    corner,
    diagonal_ranks,
    eigenvalue_copying_score,
    eigenvalues,
    largest_entries,
    row,
    singular,
    top_k_accuracy,
)
from tests.close import assert_close, assert_same
from tests.reference import weights as reference

TILES = ((1024, 1024), (3, 6), (1, 1), (4, 4))
SIDES = {"key": "columns", "query": "rows"}


@dataclasses.dataclass(frozen=True)
class Thin:
    A: torch.Tensor
    B: torch.Tensor


def drawn(n_rows, n_columns, inner, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    A = torch.randn(n_rows, inner, generator=draw)
    return Thin(A.to(dtype), torch.randn(inner, n_columns, generator=draw).to(dtype))


def whole(n_rows, n_columns, inner, seed, largest=2):
    """Small integers, whose products are exact and often tie."""
    draw = torch.Generator().manual_seed(seed)
    A = torch.randint(-largest, largest + 1, (n_rows, inner), generator=draw)
    return Thin(A.float(), torch.randint(-largest, largest + 1, (inner, n_columns), generator=draw).float())


@pytest.fixture
def tiles(monkeypatch):
    def use(rows, columns):
        monkeypatch.setattr(weights, "TILE_ROWS", rows)
        monkeypatch.setattr(weights, "TILE_COLUMNS", columns)

    return use


anything = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@anything
@given(
    size=st.integers(1, 25),
    inner=st.integers(1, 4),
    over=st.sampled_from(["key", "query"]),
    ties=st.sampled_from(["for", "against"]),
    tile=st.sampled_from(TILES),
    seed=st.integers(0, 2**31),
)
def test_ranks_match_the_full_matrix_with_ties(tiles, size, inner, over, ties, tile, seed):
    tiles(*tile)
    circuit = whole(size, size, inner, seed)
    expected = reference.diagonal_ranks(reference.dense(circuit.A, circuit.B), SIDES[over], ties)
    assert diagonal_ranks(circuit, over, ties=ties).tolist() == expected
    draw = torch.Generator().manual_seed(seed)
    # in any order, some twice
    some = torch.randint(size, (7,), generator=draw)
    found = diagonal_ranks(circuit, over, tokens=some, ties=ties)
    assert found.tolist() == [expected[token] for token in some]
    frequencies = torch.rand(7, generator=draw).tolist()
    k = 1 + seed % size
    accuracy = top_k_accuracy(circuit, k, over, tokens=some, weights=frequencies, ties=ties)
    # sums of seven numbers in float64
    assert accuracy == pytest.approx(reference.accuracy(expected, k, some.tolist(), frequencies), abs=1e-12)
    assert top_k_accuracy(circuit, k, over, ties=ties) == pytest.approx(
        reference.accuracy(expected, k, range(size), [1] * size), abs=1e-12
    )


@pytest.mark.parametrize("over", ["key", "query"])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_of_random_factors_in_full_size_tiles(over, seed):
    size = weights.TILE_COLUMNS + 76
    circuit = drawn(size, size, 16, seed)
    matrix = reference.dense(circuit.A, circuit.B)
    expected = reference.diagonal_ranks(matrix, SIDES[over], "for")
    found = diagonal_ranks(circuit, over)
    # float32 rounding may swap neighbors, but only a few of a million entries
    assert (found - torch.tensor(expected)).abs().max() <= 1
    assert (found != torch.tensor(expected)).sum() <= 3


def test_entries_equal_to_the_diagonal_tie_in_every_tile():
    # every token twice, with copies far enough apart to be in different tiles; the last tile is narrow
    once = drawn(2600, 2600, 33, seed=1)
    circuit = Thin(once.A.repeat(2, 1), once.B.repeat(1, 2))
    for over in ("key", "query"):
        own = diagonal_ranks(circuit, over)
        against = diagonal_ranks(circuit, over, ties="against")
        # only the copy ties
        assert torch.equal(against, own + 1)
        assert torch.equal(own[:2600], own[2600:])


@pytest.mark.parametrize("size", [weights.TILE_COLUMNS + extra for extra in (1, 2, 81)])
@pytest.mark.parametrize("seed", range(4))
def test_a_copy_in_a_narrow_last_tile_ties(size, seed):
    """Products of one or a few columns are rounded in a different order than those of many."""
    circuit = drawn(size, size, 64, seed)
    circuit.B[:, 5] = 10 * circuit.A[5]
    circuit.A[-1], circuit.B[:, -1] = circuit.A[5], circuit.B[:, 5]
    twins = [5, size - 1]
    for over in ("key", "query"):
        for tokens in (None, twins, [5], [size - 1]):
            asked = twins if tokens is None else range(len(tokens))
            assert diagonal_ranks(circuit, over, tokens=tokens)[asked].tolist() == [1] * len(asked)
            against = diagonal_ranks(circuit, over, tokens=tokens, ties="against")
            assert against[asked].tolist() == [2] * len(asked)


def test_rows_are_queries_and_columns_are_keys():
    # query 0 prefers key 1 to itself, every other query itself; as a key, 0 has no better query
    matrix = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 0.0], [0.5, 0.0, 1.0]])
    circuit = Thin(matrix, torch.eye(3))
    assert diagonal_ranks(circuit, "key").tolist() == [2, 1, 1]
    assert diagonal_ranks(circuit, "query").tolist() == [1, 1, 1]
    assert diagonal_ranks(circuit).tolist() == [2, 1, 1]
    assert top_k_accuracy(circuit, 1) == pytest.approx(2 / 3)
    assert top_k_accuracy(circuit, 1, "query") == 1
    assert top_k_accuracy(circuit, 1, tokens=[0, 1], weights=[3, 1]) == 0.25
    assert top_k_accuracy(circuit, 2, tokens=[0]) == 1


def test_a_circuit_names_its_own_axes():
    matrix = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    circuit = SimpleNamespace(A=matrix, B=torch.eye(2), axes=("source", "destination"))
    assert diagonal_ranks(circuit, "destination").tolist() == [2, 1]
    assert diagonal_ranks(circuit, "source").tolist() == [1, 1]
    assert diagonal_ranks(circuit).tolist() == [2, 1]
    with pytest.raises(ValueError, match="'source' or 'destination', got 'key'"):
        diagonal_ranks(circuit, "key")


def test_constant_entries_all_tie():
    circuit = Thin(torch.ones(5, 1), torch.ones(1, 5))
    assert diagonal_ranks(circuit).tolist() == [1] * 5
    assert diagonal_ranks(circuit, ties="against").tolist() == [5] * 5
    assert top_k_accuracy(circuit, 4, ties="against") == 0
    assert top_k_accuracy(circuit, 5, ties="against") == 1


def test_parameters_and_bfloat16_weights_are_read():
    circuit = drawn(12, 12, 3, dtype=torch.bfloat16)
    narrow = Thin(torch.nn.Parameter(circuit.A), torch.nn.Parameter(circuit.B))
    expected = reference.diagonal_ranks(reference.dense(circuit.A, circuit.B), "columns", "for")
    # in bfloat16, products with 8 bits would tie
    assert diagonal_ranks(narrow).tolist() == expected
    assert not largest_entries(narrow, 3).values.requires_grad
    assert_same(eigenvalue_copying_score(narrow), eigenvalue_copying_score(Thin(circuit.A, circuit.B)))
    assert corner(narrow, [0], None).dtype == torch.float32
    deep = drawn(12, 12, 3, dtype=torch.float64)
    assert singular(deep, 1).S.dtype == torch.float64


def test_the_engines_factored_matrix_is_a_circuit():
    from transformer_lens import FactoredMatrix

    circuit = drawn(9, 9, 2)
    theirs = FactoredMatrix(circuit.A, circuit.B)
    assert torch.equal(diagonal_ranks(theirs), diagonal_ranks(circuit))
    assert torch.equal(diagonal_ranks(theirs.T), diagonal_ranks(circuit, "query"))
    found, U_S_V = singular(theirs, 2), theirs.svd()
    # two ways to compute the same values in float32
    assert torch.allclose(found.S, U_S_V[1], rtol=1e-5)


@anything
@given(
    n_rows=st.integers(1, 13),
    n_columns=st.integers(1, 13),
    share=st.floats(0, 1),
    largest=st.integers(0, 2),
    tile=st.sampled_from(TILES),
    seed=st.integers(0, 2**31),
)
def test_largest_entries_match_the_full_matrix_with_ties(
    tiles, n_rows, n_columns, share, largest, tile, seed
):
    tiles(*tile)
    circuit = whole(n_rows, n_columns, 2, seed, largest)
    n = max(1, round(share * n_rows * n_columns))
    expected = reference.largest_entries(reference.dense(circuit.A, circuit.B), n)
    found = largest_entries(circuit, n)
    assert list(zip(*(part.tolist() for part in found), strict=True)) == expected


def test_largest_entries_of_random_factors():
    circuit = drawn(700, 5000, 8)
    matrix = reference.dense(circuit.A, circuit.B)
    found = largest_entries(circuit, 50)
    best = matrix.flatten().topk(50)
    # float32 sums of eight products, in entries of about 30
    assert torch.allclose(found.values.double(), best.values, rtol=1e-5)
    assert torch.equal(found.rows * 5000 + found.columns, best.indices)


def test_many_more_ties_than_requested_entries_are_skipped(tiles, monkeypatch):
    tiles(8, 16)
    looked = []
    topk = torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, n: looked.append(n) or topk(self, n))
    circuit = Thin(torch.zeros(80, 2), torch.zeros(2, 80))
    found = largest_entries(circuit, 20)
    # ties go to the first row, which continues in the second tile
    assert found.rows.tolist() == [0] * 20
    assert found.columns.tolist() == list(range(20))
    # the first two tiles of the first rows have all requested entries, and no other is sorted
    assert len(looked) == 2


def test_rows_columns_and_corners_match_the_full_matrix():
    circuit = drawn(7, 5, 3)
    matrix = reference.dense(circuit.A, circuit.B)
    # sums of three products
    close = {"rtol": 1e-5, "atol": 1e-5}
    assert torch.allclose(row(circuit, 6).double(), matrix[6], **close)
    assert torch.allclose(column(circuit, 4).double(), matrix[:, 4], **close)
    some = corner(circuit, [6, 0, 6], torch.tensor([4, 1]))
    assert torch.allclose(some.double(), matrix[[6, 0, 6]][:, [4, 1]], **close)
    assert corner(circuit, None, []).shape == (7, 0)


@pytest.mark.parametrize("shape", [(9, 7, 3), (3, 8, 5), (8, 2, 4), (6, 6, 6)])
@pytest.mark.parametrize("seed", range(3))
def test_singular_values_and_vectors_match_the_full_matrix(shape, seed):
    n_rows, n_columns, inner = shape
    circuit = drawn(n_rows, n_columns, inner, seed)
    matrix = reference.dense(circuit.A, circuit.B)
    most = min(shape)
    expected = torch.linalg.svdvals(matrix)[:most]
    found = singular(circuit, most)
    # float32 decompositions are accurate to the last digits of the largest value
    unit = 1e-5 * float(expected[0])
    assert torch.allclose(found.S.double(), expected, rtol=0, atol=unit)
    rebuilt = (found.U * found.S) @ found.V.mT
    assert torch.allclose(rebuilt.double(), matrix, rtol=0, atol=unit)
    for vectors in (found.U, found.V):
        assert torch.allclose(vectors.mT @ vectors, torch.eye(most), atol=1e-5)
    assert (found.U.gather(0, found.U.abs().argmax(0, keepdim=True)) > 0).all()
    first = singular(circuit, 1)
    assert_close(first.U[:, 0], found.U[:, 0])
    assert_close(first.V[:, 0], found.V[:, 0])


@pytest.mark.parametrize(("size", "inner"), [(9, 4), (4, 4), (3, 6)])
@pytest.mark.parametrize("seed", range(4))
def test_eigenvalues_and_copying_score_match_the_full_matrix(size, inner, seed):
    circuit = drawn(size, size, inner, seed)
    every = reference.eigenvalues(reference.dense(circuit.A, circuit.B))
    found = eigenvalues(circuit)
    assert len(found) == min(size, inner)
    sizes = found.abs()
    assert (sizes.diff() <= 0).all()
    left = every.tolist()
    for value in found.tolist():
        near = min(left, key=lambda other: abs(other - value))  # called at once
        # float32; eigenvalues of nonsymmetric matrices amplify rounding
        assert abs(near - value) < 1e-4 * float(every.abs().max())
        left.remove(near)
    # the remaining eigenvalues of the large matrix are zero
    assert all(abs(value) < 1e-6 for value in left)
    score = float(every.real.sum() / every.abs().sum())
    assert eigenvalue_copying_score(circuit) == pytest.approx(score, abs=1e-4)


def test_copying_scores_known_by_hand():
    eye = torch.eye(4)
    assert eigenvalue_copying_score(Thin(eye, eye)) == 1
    assert eigenvalue_copying_score(Thin(eye, -2 * eye)) == -1
    assert eigenvalue_copying_score(Thin(eye, torch.diag(torch.tensor([3.0, -1.0, 0.0, 0.0])))) == 0.5
    # a quarter turn has eigenvalues i and -i
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    assert eigenvalue_copying_score(Thin(turn, torch.eye(2))) == pytest.approx(0, abs=1e-6)


def test_the_copying_score_is_undefined_without_eigenvalues():
    zero = torch.zeros(4, 2)
    assert math.isnan(eigenvalue_copying_score(Thin(zero, zero.mT)))
    # the head writes where it does not read: zero up to rounding
    Q = torch.linalg.qr(drawn(40, 4, 4).A @ drawn(40, 4, 4).B).Q
    assert math.isnan(eigenvalue_copying_score(Thin(Q[:, :2], Q[:, 2:].mT)))


def test_arguments_out_of_range_are_refused():
    square, wide = drawn(4, 4, 2), drawn(4, 5, 2)
    for measure in (
        diagonal_ranks,
        lambda circuit: top_k_accuracy(circuit, 1),
        eigenvalues,
        eigenvalue_copying_score,
    ):
        with pytest.raises(ValueError, match="must be square, got 4 x 5"):
            measure(wide)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"vocabulary of 4, got {k}"):
            top_k_accuracy(square, k)
    for n in (0, 21):
        with pytest.raises(ValueError, match=f"4 x 5 entries, got {n}"):
            largest_entries(wide, n)
    for n in (0, 3):
        with pytest.raises(ValueError, match=f"between 1 and 2, .* got {n}"):
            singular(wide, n)
    with pytest.raises(ValueError, match="'query' or 'key', got 'source'"):
        diagonal_ranks(square, "source")
    with pytest.raises(ValueError, match="'for' or 'against' the diagonal, got 'none'"):
        diagonal_ranks(square, ties="none")
    for token in (-1, 4):
        with pytest.raises(ValueError, match=f"between 0 and 3, but there is {token}"):
            diagonal_ranks(square, tokens=[0, token])
        with pytest.raises(ValueError, match=f"rows must be between 0 and 3, but there is {token}"):
            row(wide, token)
    with pytest.raises(ValueError, match="columns must be between 0 and 4, but there is 5"):
        column(wide, 5)
    with pytest.raises(ValueError, match="at least 1 token"):
        top_k_accuracy(square, 1, tokens=[])
    assert diagonal_ranks(square, tokens=[]).tolist() == []
    with pytest.raises(ValueError, match="one for each of 2 tokens, but have shape \\(3,\\)"):
        top_k_accuracy(square, 1, tokens=[0, 1], weights=[1.0, 1.0, 1.0])
    for wrong in ([1.0, -1.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]):
        with pytest.raises(ValueError, match="finite and not negative, and at least one must be above 0"):
            top_k_accuracy(square, 1, tokens=[0, 1], weights=wrong)
    for value in (math.nan, math.inf):
        damaged = Thin(square.A.clone(), square.B)
        damaged.A[3, 1] = value
        with pytest.raises(ValueError, match="contain nan or infinity"):
            diagonal_ranks(damaged)
    with pytest.raises(ValueError, match="take one circuit of a stack"):
        eigenvalues(Thin(square.A[None], square.B[None]))


def test_a_boolean_mask_is_not_a_list_of_tokens():
    code = "tokens must be integers, got torch.bool"
    with pytest.raises(TypeError, match=code):
        weights._ids("token", torch.tensor([True, False]), 2)


def test_no_tensor_is_as_large_as_the_matrix():
    """All of PyTorch's allocations stay far below the matrix's 64 MiB, and are freed."""
    from torch.profiler import ProfilerActivity, profile

    circuit = drawn(4096, 4096, 4)
    for work in (
        lambda: top_k_accuracy(circuit, 1),
        lambda: top_k_accuracy(circuit, 1, "query", tokens=range(0, 4096, 3)),
        lambda: largest_entries(circuit, 10),
        lambda: singular(circuit, 2),
    ):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            work()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        ordered = sorted(events, key=lambda event: event.start_ns())
        held = list(itertools.accumulate(event.nbytes() for event in ordered))
        # a tile of 4 MiB, and once the indices and sort order of all entries of the first tile
        assert max(held, default=0) < 48 * 2**20
