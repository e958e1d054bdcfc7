"""Variance of the lens's logits by final rank, on real small models."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mechlens.analyses.logit_variance import logit_variance
from mechlens.models.load.loading import load_model
from mechlens.results import LogitVariance
from tests.close import assert_close, assert_same
from tests.reference import vocabulary_variance as reference


def tokens_for(batch=2, length=6):
    draw = torch.Generator().manual_seed(3)
    return torch.randint(4, 50, (batch, length), generator=draw)


def test_every_number_equals_the_slow_reference(tiny_model):
    tokens = tokens_for()
    found = logit_variance(tiny_model, tokens, bins=(1, 8))
    assert found.rows == ("embed", "0", "1")
    assert found.bins == ((1, 1), (2, 8), (9, 64))
    assert found.labels == ("1", "2-8", "9-64")
    kinds = ("blocks.0.hook_resid_pre", "hook_resid_post")
    with torch.no_grad():
        _, cache = tiny_model.run_with_cache(tokens, names_filter=lambda name: name.endswith(kinds))
        names = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
        logits = torch.stack([tiny_model.ln_final(cache[name]) @ tiny_model.W_U for name in names])
        logits = (logits + tiny_model.b_U).double()
        own = tiny_model(tokens).softmax(-1)
    for b in range(2):
        for pos in range(6):
            variance, rows = reference.by_bin(logits[:, b, pos].tolist(), found.bins)
            # float32 logits up to 10
            assert found.variance[:, b, pos].tolist() == pytest.approx(variance, rel=1e-3)
            got = [values[:, :, b, pos] for values in (found.mean_logit, found.spread, found.excess)]
            expected = torch.tensor(rows).double()
            torch.testing.assert_close(torch.stack(got, dim=-1).double(), expected, atol=2e-5, rtol=1e-4)
    best = own.max(-1).values
    torch.testing.assert_close(found.probability[0], best, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.probability.sum(0), torch.ones(2, 6))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_processed_and_raw_weights_agree(tiny_directories, kind):
    raw, processed = (
        logit_variance(load_model(tiny_directories / kind, processing=state), tokens_for(batch=1))
        for state in (False, True)
    )
    for name in ("variance", "elsewhere_variance", "null_variance", "mean_logit", "spread", "excess"):
        # float32 weights, rounded twice
        torch.testing.assert_close(getattr(raw, name), getattr(processed, name), atol=1e-4, rtol=1e-3)


def test_positions_select_columns(tiny_bos_model):
    tokens = tokens_for()
    whole = logit_variance(tiny_bos_model, tokens)
    part = logit_variance(tiny_bos_model, tokens, positions=[-1, 2])
    assert part.positions == (5, 2)
    torch.testing.assert_close(part.variance, whole.variance[:, :, [5, 2]])
    torch.testing.assert_close(part.excess, whole.excess[..., [5, 2]])


def test_the_seed_is_used_and_one_position_has_no_elsewhere(tiny_bos_model):
    one, same, other = (logit_variance(tiny_bos_model, "abc", seed=seed) for seed in (1, 1, 2))
    assert_same(one, same)
    assert not torch.equal(one.null_variance, other.null_variance)
    assert_close(one.variance, other.variance)
    alone = logit_variance(tiny_bos_model, "abc", positions=[1])
    assert alone.elsewhere_variance.isnan().all()
    assert math.isnan(alone.estimates()["elsewhere_ratio"])


def test_known_numbers(tiny_bos_model):
    found = logit_variance(tiny_bos_model, "abc")
    assert found.bins == ((1, 1), (2, 10), (11, 64))

    def by_row(*values):
        return torch.tensor(values)[:, None, None, None].expand(-1, 3, 1, 4).contiguous()

    known = dataclasses.replace(
        found,
        rows=("embed", "0", "1", "2"),
        variance=torch.tensor([2.0, 1.0, 3.0])[:, None, None].expand(-1, 1, 4),
        null_variance=torch.tensor([[1.0, 1.0, 2.0], [1.0, 1.0, 4.0]]),
        mean_logit=by_row(0.0, 0.0, 0.0, 0.0),
        excess=by_row(9.0, 2.0, 0.5, 0.0),
        spread=by_row(9.0, 2.0, 3.0, 2.0),
    )
    found = known.estimates()
    assert found["variance_ratio"] == 1.5
    assert [found[f"null_ratio{end}"] for end in ("", "_low", "_high")] == [3.0, 2.0, 4.0]
    # none of them includes the row `embed`
    assert (found["peak_excess"], found["peak_row"], found["left_before_last"]) == (2.0, 0.0, 0.25)
    assert found["spread_bulge"] == 1.5


def test_a_result_can_be_saved_and_makes_a_table(tiny_bos_model, tmp_path):
    found = logit_variance(tiny_bos_model, "abc")
    assert LogitVariance.load(found.save(tmp_path / "a.safetensors")) == found
    table = found.to_dataframe()
    assert len(table) == 3 * 3 * 4
    row = table[(table.row == "1") & (table.bin == "2-10") & (table.pos == 2)].iloc[0]
    assert (row.first_rank, row.last_rank) == (2, 10)
    assert row.spread == float(found.spread[2, 1, 0, 2])
    assert row.variance == float(found.variance[1, 0, 2])
    assert row.null_variance == pytest.approx(float(found.null_variance[:, 1].mean()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": [10, 5]}, r"bins must be increasing ranks between 1 and 64 \(d_vocab\), got"),
        ({"bins": [0]}, "bins must be increasing ranks"),
        ({"bins": [65]}, "bins must be increasing ranks"),
        ({"positions": [4]}, "position 4 is out of range"),
        ({"nulls": 0}, "nulls must be at least 1"),
    ],
)
def test_a_wrong_argument_is_an_error_that_names_it(tiny_bos_model, options, message):
    with pytest.raises(ValueError, match=message):
        logit_variance(tiny_bos_model, "abc", **options)
