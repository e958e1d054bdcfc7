"""Attention spread compared with loops over single positions of TransformerLens's cache."""

from __future__ import annotations

import math

import pytest
import torch

import mechlens
from mechlens.measures.attention_spread import attention_spread as spread
from tests.close import assert_close


def test_uniform_attention_has_the_largest_entropy():
    uniform = torch.tril(torch.ones(3, 3)) / torch.arange(1, 4)[:, None]
    entropy, distance, first = spread(uniform).tolist()
    assert entropy == pytest.approx((math.log(2) + math.log(3)) / 2, abs=1e-6)
    assert distance == pytest.approx((0.5 + 1) / 2)
    assert first == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_spread_agrees_with_sums_over_single_positions(bundled):
    tokens = torch.tensor([[0, 5, 9, 5, 9, 40, 7], [0, 8, 8, 3, 11, 2, 6]])
    found = mechlens.attention_spread(bundled, tokens)
    _, cache = bundled.run_with_cache(tokens)
    for layer, head in [(0, 0), (1, 2), (3, 5)]:
        totals = [0.0, 0.0, 0.0]
        for row in range(2):
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][row, head].double().tolist()
            for dest in range(1, 7):
                for src in range(dest + 1):
                    share = pattern[dest][src]
                    totals[0] -= share * math.log(share) if share > 0 else 0.0
                    totals[1] += share * (dest - src)
                totals[2] += pattern[dest][0]
        assert_close(found.values[layer, head], torch.tensor(totals) / 12)


def test_the_summary_leaves_out_resting_heads(bundled):
    found = mechlens.attention_spread(bundled, "Mr. Pickwick met Mr. Winkle.")
    listed = found.summary(5)
    assert (listed["first"] < 0.5).all()
    assert listed["entropy"].is_monotonic_increasing
    assert len(found.to_dataframe()) == 24


def test_one_token_is_refused(bundled):
    with pytest.raises(ValueError, match="at least 2 positions, got 1"):
        mechlens.attention_spread(bundled, torch.tensor([[3]]))
