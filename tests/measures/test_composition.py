"""Composition scores compared with full matrices, the engine's scores, known values, and random heads."""

from __future__ import annotations

import math

import pytest
import torch

from mechlens.measures import composition
from mechlens.measures.composition import composition_scores, random_composition
from tests.close import assert_same
from tests.reference import weights as reference


def heads(count, size, d_head, other, seed):
    draw = torch.Generator().manual_seed(seed)
    first = torch.randn(count, size, d_head, generator=draw)
    return first, torch.randn(count, d_head, other, generator=draw)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tile", [(1024, 1024), (3, 6), (1, 1)])
@pytest.mark.parametrize(
    ("inner1", "inner2", "size1", "size2"),
    # same shape; heads of different sizes; inner dimension larger than the outer ones
    [(3, 3, 8, 8), (2, 4, 8, 8), (3, 4, 2, 1)],
)
def test_composition_matches_full_matrices(monkeypatch, seed, tile, inner1, inner2, size1, size2):
    monkeypatch.setattr(composition, "TILE_ROWS", tile[0])
    monkeypatch.setattr(composition, "TILE_COLUMNS", tile[1])
    A1, B1 = heads(5, size1, inner1, 8, seed)
    A2, B2 = heads(4, 8, inner2, size2, seed + 100)
    expected = reference.composition(A1, B1, A2, B2)
    found = composition_scores(A1, B1, A2, B2)
    # float32 numbers up to 1
    assert torch.allclose(found.double(), expected, rtol=0, atol=2e-6)
    assert not torch.allclose(found, composition_scores(A1, B1, A2, B2.flip(1)), atol=1e-3) or size2 == 1
    # unordered layers, and one without earlier heads
    source_layers, destination_layers = torch.tensor([2, 0, 2, 5, 1]), torch.tensor([2, 0, 3, 1])
    some = composition_scores(
        A1, B1, A2, B2, source_layers=source_layers, destination_layers=destination_layers
    )
    asked = source_layers[:, None] < destination_layers
    assert torch.equal(some.isnan(), ~asked)
    assert torch.allclose(some[asked].double(), expected[asked], rtol=0, atol=2e-6)


def test_composition_matches_the_engines():
    from transformer_lens import FactoredMatrix
    from transformer_lens.utilities import composition_scores as theirs

    W_V, W_O = heads(6, 10, 3, 10, seed=1)
    W_Q, W_K = heads(6, 10, 3, 10, seed=2)[0], heads(6, 10, 3, 10, seed=3)[0]
    OV, QK = FactoredMatrix(W_V, W_O), FactoredMatrix(W_Q, W_K.mT)
    for right in (QK, QK.T, OV):
        expected = theirs(OV, right, broadcast_dims=True)
        found = composition_scores(OV.A, OV.B, right.A, right.B)
        # both in float32, for numbers up to 1
        assert torch.allclose(found, expected, rtol=0, atol=2e-6)


def test_composition_known_by_hand():
    basis = torch.eye(6)
    read, write = basis[:, :2], basis[:2]
    # the later head reads everything that the earlier one writes: two equal directions
    through = composition_scores(read[None], write[None], basis[None, :, :2], basis[None, 2:4])
    assert float(through) == pytest.approx(1 / math.sqrt(2), abs=1e-6)
    one = composition_scores(read[None, :, :1], write[None, :1], basis[None, :, :1], basis[None, 2:3])
    assert float(one) == pytest.approx(1, abs=1e-6)
    # the earlier head writes where the later one does not read
    past = composition_scores(read[None], write[None], basis[None, :, 2:4], basis[None, :2])
    assert float(past) == 0
    # a head of zeros has no norm to divide by, and does not affect others
    pair = composition_scores(
        torch.stack([read, 0 * read]), torch.stack([write] * 2), read[None], write[None]
    )
    assert pair[:, 0].isnan().tolist() == [False, True]


def test_composition_of_bfloat16_and_tiny_weights():
    A1, B1 = heads(2, 8, 3, 8, seed=0)
    A2, B2 = heads(2, 8, 3, 8, seed=1)
    narrow = [weight.bfloat16().requires_grad_() for weight in (A1, B1, A2, B2)]
    found = composition_scores(*narrow)
    assert found.dtype == torch.float32
    expected = reference.composition(*(weight.detach() for weight in narrow))
    # float32 numbers up to 1; in bfloat16 it would be 4e-3
    assert torch.allclose(found.double(), expected, rtol=0, atol=2e-6)
    # squares of 1e-24 underflow in float32
    tiny = composition_scores(*(1e-6 * weight for weight in (A1, B1, A2, B2)))
    assert torch.allclose(tiny, composition_scores(A1, B1, A2, B2), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("d_model", "d_head"), [(32, 8), (12, 12), (20, 1)])
def test_random_heads_compose_only_by_chance(d_model, d_head):
    mean, deviation = random_composition(d_model, d_head, n=400, seed=1)
    draw = torch.Generator().manual_seed(9)
    A1, A2 = torch.randn(2, 400, d_model, d_head, generator=draw)
    B1, B2 = torch.randn(2, 400, d_head, d_model, generator=draw)
    scores = torch.cat(
        [reference.composition(*(w[i : i + 1] for w in (A1, B1, A2, B2)))[0] for i in range(400)]
    )
    # five standard errors of the difference between two means, and between two standard deviations
    error = float(scores.std()) * math.sqrt(2 / 400)
    assert mean == pytest.approx(float(scores.mean()), abs=5 * error)
    assert deviation == pytest.approx(float(scores.std()), abs=5 * error)
    # the directions of random heads are independent of each other: the mean square is exactly 1 / d_model
    square = float(scores.square().std()) / math.sqrt(400)
    assert mean**2 + deviation**2 == pytest.approx(1 / d_model, abs=5 * square)
    again = random_composition(d_model, d_head, n=5, seed=1)
    assert_same(random_composition(d_model, d_head, n=5, seed=1), again)
    assert random_composition(d_model, d_head, n=5, seed=1) != random_composition(
        d_model, d_head, n=5, seed=2
    )


def test_arguments_out_of_range_are_refused():
    A, B = heads(2, 4, 2, 4, seed=0)
    with pytest.raises(ValueError, match="both sources and destinations"):
        composition_scores(A, B, A, B, source_layers=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="n must be at least 2"):
        random_composition(4, 2, n=1)
    with pytest.raises(ValueError, match="at least 1, got 0 and 2"):
        random_composition(0, 2)
