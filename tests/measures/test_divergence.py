"""KL divergence and its gradient, compared with PyTorch's, and at excluded tokens."""

from __future__ import annotations

import math

import pytest
import torch

from mechlens.measures.divergence import kl, reference_of
from mechlens.measures.unembedding import Unembedding


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_kl_and_its_gradient_match_autograd(cap):
    unembedding = Unembedding(drawn(8, 40, seed=0), drawn(40, seed=1), cap)
    reference, vectors = drawn(5, 8, seed=2), drawn(5, 8, seed=3).requires_grad_()

    def log_probs(x: torch.Tensor) -> torch.Tensor:
        logits = x @ unembedding.W_U + unembedding.b_U
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    own, other = log_probs(reference), log_probs(vectors)
    expected = torch.nn.functional.kl_div(other, own, log_target=True, reduction="none").sum(-1)
    (gradient,) = torch.autograd.grad(expected.sum(), vectors)
    with torch.no_grad():
        found, by_vector = reference_of(unembedding, reference).kl_and_gradient(vectors.detach())
    # float64 sums of 40 terms
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(by_vector, gradient, rtol=0, atol=1e-12)


def test_a_token_that_the_reference_excludes_adds_nothing():
    log_p = torch.tensor([-math.inf, math.log(0.5), math.log(0.5)])
    log_q = torch.tensor([math.log(0.5), math.log(0.25), math.log(0.25)])
    assert float(kl(log_p, log_q)) == pytest.approx(math.log(2), abs=1e-6)
    assert float(kl(log_p, log_p)) == 0
    assert float(kl(log_q, log_p)) == math.inf
