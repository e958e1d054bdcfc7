"""Attribution patching against the slope of exact patches, and its refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mechlens.analyses.patching import Corrupted, attribution_patching, patch_grid
from mechlens.models.load.loading import load_model
from mechlens.models.run.patched_runs import SITES
from mechlens.results import AttributionPatchResult
from tests.close import assert_close

LENGTH = 6


def tokens_for(seed=0, rows=1):
    return torch.randint(4, 50, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["gpt2", "gpt_neox", "llama"])
def patch_model(request, load_once, tiny_directories):
    return load_once(tiny_directories / request.param)


def slope(model, tokens, **options):
    """Of the exact metric by the weight of the source, from both sides."""
    step = 1e-2
    up, down = (patch_grid(model, tokens, weight=weight, **options) for weight in (step, -step))
    return (up.values - down.values) / (2 * step)


@pytest.mark.parametrize("site", SITES)
def test_the_estimate_is_the_slope_of_the_exact_effect(patch_model, site):
    if SITES[site].format(0) not in patch_model.hook_dict:
        return
    tokens = tokens_for()
    source = halved if site in ("pattern", "attn_scores") else Corrupted(tokens_for(1))
    options = {"site": site, "source": source, "positions": None if site in ("k", "z") else [2, 4]}
    if site in ("q", "k", "v", "z", "pattern", "attn_scores"):
        options["heads"] = "each"
    found = attribution_patching(patch_model, tokens, **options)
    expected = slope(patch_model, tokens, **options)
    assert found.estimate.shape == expected.shape
    # the third order of the series, and a loss of 7 digits divided by the step
    assert (found.estimate - expected).abs().max() < 0.01 * expected.abs().max() + 2e-4
    assert expected.abs().max() > 0.005, "something is measured"


def halved(activation, layer):
    """Finite changes, of what is attended to only."""
    return activation.where(~((activation > -1e4) & (activation != 0)), activation / 2)


def test_prompts_metrics_heads_and_weight(tiny_bos_model):
    tokens, other = tokens_for(rows=2), tokens_for(1, rows=2)
    targets, against = tokens_for(7, rows=2), tokens_for(8, rows=2)

    def largest(logits):
        return logits.max() - logits[0].mean()

    kinds = {
        "log_prob": {"targets": targets, "read": [1, 4]},
        "logit_diff": {"targets": targets, "against": against},
        largest: {},
    }
    for metric, given in kinds.items():
        options = {
            "site": "attn_out",
            "source": Corrupted(other),
            "metric": metric,
            "layers": [1],
            "positions": [1, 4],
        }
        options |= given
        found = attribution_patching(tiny_bos_model, tokens, weight=0.5, **options)
        expected = 0.5 * slope(tiny_bos_model, tokens, **options)
        assert (found.estimate - expected).abs().max() < 0.01 * expected.abs().max() + 2e-4, metric


def test_denoising_takes_the_slope_at_the_corrupted_run_and_may_ask_for_kl(tiny_bos_model):
    tokens, options = (
        tokens_for(),
        {
            "site": "mlp_out",
            "source": Corrupted(tokens_for(1)),
            "direction": "denoising",
            "positions": [2, 4],
        },
    )
    for metric in ("loss", "kl"):
        found = attribution_patching(tiny_bos_model, tokens, metric=metric, **options)
        expected = slope(tiny_bos_model, tokens, metric=metric, **options)
        assert (found.estimate - expected).abs().max() < 0.01 * expected.abs().max() + 2e-4
        exact = patch_grid(tiny_bos_model, tokens, metric=metric, **options)
        assert torch.allclose(found.clean, exact.clean, atol=1e-5)
        assert torch.allclose(found.corrupted, exact.corrupted, atol=1e-5)


def test_a_bfloat16_model_is_estimated_as_its_float32_twin(tiny_directories):
    tokens = tokens_for()
    wide, narrow = (load_model(tiny_directories / "gpt2", dtype=dtype) for dtype in ("float32", "bfloat16"))
    for site in ("mlp_out", "z"):
        options = {"site": site, "source": Corrupted(tokens_for(1))}
        expected = attribution_patching(wide, tokens, **options)
        found = attribution_patching(narrow, tokens, **options)
        assert found.estimate.dtype == torch.float32
        # 8 bits of mantissa, through two layers and back
        assert (found.estimate - expected.estimate).abs().max() < 0.05 * expected.estimate.abs().max()


def test_it_says_how_well_it_correlates_with_the_exact_grid_of_the_same_arguments(tiny_bos_model):
    tokens, options = tokens_for(rows=2), {"site": "mlp_out", "source": "zero"}
    exact = patch_grid(tiny_bos_model, tokens, **options)
    found = attribution_patching(tiny_bos_model, tokens, exact=exact, **options)
    pair = torch.stack([found.effect.flatten(), exact.effect.flatten()])
    assert found.correlation == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-5)
    assert attribution_patching(tiny_bos_model, tokens, **options).correlation is None
    with pytest.raises(ValueError, match="made with site 'mlp_out', not 'attn_out': give"):
        attribution_patching(tiny_bos_model, tokens, exact=exact, site="attn_out", source="zero")
    with pytest.raises(ValueError, match="made with other tokens"):
        attribution_patching(tiny_bos_model, tokens_for(3, rows=2), exact=exact, **options)
    shifted = dataclasses.replace(exact, clean=exact.clean + 1)
    with pytest.raises(ValueError, match="the exact grid's clean run has loss"):
        attribution_patching(tiny_bos_model, tokens, exact=shifted, **options)


def test_the_weights_and_hooks_are_left_as_they_were(tiny_bos_model):
    parameters = list(tiny_bos_model.parameters())
    before = [parameter.requires_grad for parameter in parameters]

    def stop(logits):
        if logits.abs().sum() > 0:  # it is first tried on zeros
            raise KeyboardInterrupt
        return logits.sum()

    options = {"site": "z", "source": "zero", "heads": "each", "positions": None}
    with torch.inference_mode():
        usual = attribution_patching(tiny_bos_model, tokens_for(), **options)
    with pytest.raises(KeyboardInterrupt):
        attribution_patching(tiny_bos_model, tokens_for(), metric=stop, **options)
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        frozen = attribution_patching(tiny_bos_model, tokens_for(), **options)
    finally:
        for parameter, was in zip(parameters, before, strict=True):
            parameter.requires_grad_(was)
    assert_close(usual.estimate, frozen.estimate)
    assert all(parameter.grad is None for parameter in parameters)
    assert not any(point.fwd_hooks for point in tiny_bos_model.hook_dict.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "kl"}, "smallest at the clean run, so its gradient there is zero"),
        ({"metric": lambda logits: logits.argmax().float()}, "without a gradient by the logits"),
        ({"site": "attn_scores"}, "minus infinity, which no gradient reaches"),
        ({"layers": [2]}, "there is no layer 2"),
    ],
)
def test_what_has_no_gradient_is_refused(tiny_bos_model, options, message):
    with pytest.raises(ValueError, match=message):
        attribution_patching(tiny_bos_model, tokens_for(), **{"site": "mlp_out", "source": "zero", **options})


def test_it_says_that_it_is_an_approximation_and_comes_back(tiny_bos_model, tmp_path):
    found = attribution_patching(tiny_bos_model, tokens_for(), site="z", source="zero", heads=[1, 3])
    assert "approximation='first order'" in repr(found)
    assert AttributionPatchResult.load(found.save(tmp_path / "a.safetensors")) == found
    table = found.to_dataframe()
    row = table[(table.label == "L1H3") & (table.pos == 2)].iloc[0]
    assert row.effect == pytest.approx(float(found.effect[1, 1, 2]))
