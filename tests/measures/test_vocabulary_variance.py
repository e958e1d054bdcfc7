"""Variance of logits across rows by final rank, compared with one token at a time."""

from __future__ import annotations

import pytest
import torch

from mechlens.measures import vocabulary_variance as module
from mechlens.measures.unembedding import Unembedding
from mechlens.measures.vocabulary_variance import vocabulary_variance
from tests.close import assert_close
from tests.reference import vocabulary_variance as reference

BINS = ((1, 1), (2, 5), (6, 17))


def drawn(rows=4, pos=5, d_model=6, d_vocab=17):
    draw = torch.Generator().manual_seed(4)
    return (
        torch.randn(rows, pos, d_model, generator=draw),
        torch.randn(d_model, d_vocab, generator=draw),
        torch.randn(d_vocab, generator=draw),
    )


def test_every_number_equals_the_slow_reference():
    vectors, W_U, b_U = drawn()
    others = torch.tensor([3, 0, 4, 2, 1])
    found = vocabulary_variance(
        vectors, Unembedding(W_U, b_U, 2.0), bins=BINS, over=slice(1, None), elsewhere=others
    )
    logits = vectors.double() @ W_U.double() + b_U.double()
    for pos in range(5):
        variance, rows = reference.by_bin(logits[:, pos].tolist(), BINS)
        # float32 compared with float64
        assert found.variance[:, pos].tolist() == pytest.approx(variance, rel=1e-4)
        got = torch.stack([found.mean[..., pos], found.spread[..., pos], found.excess[..., pos]], dim=-1)
        torch.testing.assert_close(got.double(), torch.tensor(rows).double(), atol=1e-5, rtol=1e-4)
        elsewhere, _ = reference.by_bin(logits[:, pos].tolist(), BINS, logits[-1, others[pos]].tolist())
        assert found.elsewhere_variance[:, pos].tolist() == pytest.approx(elsewhere, rel=1e-4)
        capped = 2 * torch.tanh(logits[-1, pos] / 2)
        probabilities = capped.softmax(-1)[logits[-1, pos].argsort(descending=True)]
        sums = [float(probabilities[first - 1 : last].sum()) for first, last in BINS]
        assert found.probability[:, pos].tolist() == pytest.approx(sums, rel=1e-4)


def test_a_known_case_with_ties():
    """Two rows; W_U is the identity, so vectors are logits. Tokens 1 and 2 tie finally, so 1 comes first."""
    vectors = torch.tensor([[[3.0, 0.0, 0.0]], [[0.0, 3.0, 3.0]]])
    found = vocabulary_variance(
        vectors, Unembedding(torch.eye(3), torch.zeros(3)), bins=((1, 1), (2, 2), (3, 3))
    )
    # minus their means 1 and 2: tokens 1 and 2 go from -1 to 1, token 0 from 2 to -2
    assert found.variance[:, 0].tolist() == [1.0, 1.0, 4.0]
    assert found.mean[:, :, 0].tolist() == [[-1.0, -1.0, 2.0], [1.0, 1.0, -2.0]]
    assert found.excess[:, :, 0].tolist() == [[2.0, 2.0, 4.0], [0.0, 0.0, 0.0]]
    assert found.spread.abs().max() == 0
    assert found.elsewhere_variance.isnan().all()
    assert found.null_variance.shape == (0, 3, 1)


def test_a_null_is_a_partition_of_the_same_variances():
    vectors, W_U, b_U = drawn()
    found = vocabulary_variance(
        vectors, Unembedding(W_U, b_U), bins=BINS, nulls=300, generator=torch.Generator().manual_seed(0)
    )
    sizes = torch.tensor([1.0, 4.0, 12.0])[:, None]
    total = (found.variance * sizes).sum(0)
    # every draw puts each token into one bin
    torch.testing.assert_close((found.null_variance * sizes).sum(1), total.expand(300, -1))
    variance = (vectors @ W_U + b_U - (vectors @ W_U + b_U).mean(-1, keepdim=True)).var(0, correction=0)
    # the first bin is one token, each about equally often: 300 draws from 17, to three standard errors
    mean, deviation = variance.mean(-1), variance.std(-1)
    assert ((found.null_variance[:, 0].mean(0) - mean).abs() < 3 * deviation / 300**0.5).all()
    first = [{round(value, 4) for value in found.null_variance[:, 0, pos].tolist()} for pos in range(5)]
    assert all(len(values) == 17 for values in first)
    # and it differs between positions
    tokens = (found.null_variance[:, 0, :, None] - variance).abs().argmin(-1)
    assert (tokens != tokens[:, :1]).any(-1).float().mean() > 0.9
    again = vocabulary_variance(
        vectors, Unembedding(W_U, b_U), bins=BINS, nulls=300, generator=torch.Generator().manual_seed(0)
    )
    assert_close(again.null_variance, found.null_variance)


def test_chunks_change_nothing(monkeypatch):
    vectors, W_U, b_U = drawn(pos=7)

    def run():
        return vocabulary_variance(
            vectors,
            Unembedding(W_U, b_U),
            bins=BINS,
            elsewhere=torch.arange(7).roll(1),
            nulls=2,
            generator=torch.Generator().manual_seed(0),
            decode=lambda x: x / x.norm(dim=-1, keepdim=True),
        )

    whole = run()
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 4 * 4 * 17)
    for name, value in vars(run()).items():
        # the same product in other shapes rounds differently
        torch.testing.assert_close(value, getattr(whole, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bins", [((1, 5),), ((1, 5), (7, 17)), ((2, 17),), ((1, 18),)])
def test_bins_with_gaps_are_refused(bins):
    vectors, W_U, b_U = drawn()
    with pytest.raises(ValueError, match="bins must go from rank 1 to 17 without a gap"):
        vocabulary_variance(vectors, Unembedding(W_U, b_U), bins=bins)
