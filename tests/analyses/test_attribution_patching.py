"""Attribution patching compared with the slope of exact patches, and its errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mechlens.analyses.patching import KL, LogitDiff, LogProb, Loss, NextEmbedding, Patching
from mechlens.models.load.loading import load_model
from mechlens.models.run.sites import ATTENTION, PER_HEAD, SITES
from mechlens.results import AttributionPatchResult
from tests.close import assert_close

LENGTH = 6


def tokens_for(seed=0, rows=1):
    return torch.randint(4, 50, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["gpt2", "gpt_neox", "llama"])
def patch_model(request, load_once, tiny_directories):
    return load_once(tiny_directories / request.param)


def slope(experiment, site, **options):
    """Central difference of the exact metric with respect to the weight of the values."""
    step = 1e-2
    up, down = (experiment.grid(site, weight=weight, **options) for weight in (step, -step))
    return (up.values - down.values) / (2 * step)


@pytest.mark.parametrize("site", SITES)
def test_the_estimate_is_the_slope_of_the_exact_effect(patch_model, site):
    if SITES[site].format(0) not in patch_model.hook_dict:
        pytest.skip(f"no {site} here")
    experiment = Patching(patch_model, tokens_for(), tokens_for(1))
    options = {"into": "clean", "values": halved if site in ATTENTION else None}
    options |= {"over": ("layer", "head") if site in ("k", "z") else ("layer", "head", "pos")}
    if site not in PER_HEAD:
        options["over"] = ("layer", "pos")
    options |= {} if site in ("k", "z") else {"positions": [2, 4]}
    found, expected = experiment.attribution(site, **options), slope(experiment, site, **options)
    assert found.estimate.shape == expected.shape
    # third-order terms, and float32 rounding of the loss divided by the step
    assert (found.estimate - expected).abs().max() < 0.01 * expected.abs().max() + 2e-4
    assert expected.abs().max() > 0.005, "something is measured"


@pytest.mark.parametrize(
    "options",
    [
        {"over": "layer", "heads": ["L0H1", "L1H0", "L1H3"], "positions": [1, 4]},
        {"over": ("layer", "head"), "heads": ["L0H1", "L1H0"]},
        {"over": "pos"},
        {"over": ()},
    ],
)
def test_it_sums_over_activations_that_are_patched_together(tiny_bos_model, options):
    experiment = Patching(tiny_bos_model, tokens_for(), tokens_for(1))
    found = experiment.attribution("z", into="clean", **options).estimate
    expected = slope(experiment, "z", into="clean", **options)
    assert torch.equal(found.isnan(), expected.isnan())
    off, size = (found - expected).nan_to_num().abs().max(), expected.nan_to_num().abs().max()
    assert off < 0.01 * size + 2e-4


def halved(activation, layer):
    """Finite changes, only where attention is allowed."""
    return activation.where(~((activation > -1e4) & (activation != 0)), activation / 2)


def test_prompts_metrics_and_weight_are_respected(tiny_bos_model):
    tokens, other = tokens_for(rows=2), tokens_for(1, rows=2)
    target, against = tokens_for(7, rows=2), tokens_for(8, rows=2)

    def largest(logits):
        return logits.max() - logits[0].mean()

    for metric in (LogProb(target, at=[1, 4]), LogitDiff(target, against), largest):
        experiment = Patching(tiny_bos_model, tokens, other, metric=metric)
        options = {"into": "clean", "layers": [1], "positions": [1, 4]}
        found = experiment.attribution("attn_out", weight=0.5, **options)
        expected = 0.5 * slope(experiment, "attn_out", **options)
        assert (found.estimate - expected).abs().max() < 0.01 * expected.abs().max() + 2e-4, metric


def test_denoising_takes_the_slope_at_the_corrupted_run_and_may_use_kl(tiny_bos_model):
    for metric in (Loss(), KL()):
        experiment = Patching(tiny_bos_model, tokens_for(), tokens_for(1), metric=metric)
        found = experiment.attribution("mlp_out", positions=[2, 4])
        expected = slope(experiment, "mlp_out", positions=[2, 4])
        assert (found.estimate - expected).abs().max() < 0.01 * expected.abs().max() + 2e-4
        exact = experiment.grid("mlp_out", positions=[2, 4])
        assert torch.allclose(found.clean, exact.clean, atol=1e-5)
        assert torch.allclose(found.corrupted, exact.corrupted, atol=1e-5)


def test_a_bfloat16_model_is_estimated_like_its_float32_twin(tiny_directories):
    tokens = tokens_for()
    wide, narrow = (load_model(tiny_directories / "gpt2", dtype=dtype) for dtype in ("float32", "bfloat16"))
    for site in ("mlp_out", "z"):
        expected, found = (
            Patching(model, tokens, tokens_for(1)).attribution(site, into="clean") for model in (wide, narrow)
        )
        assert found.estimate.dtype == torch.float32
        # 8 bits of mantissa, through two layers and back
        assert (found.estimate - expected.estimate).abs().max() < 0.05 * expected.estimate.abs().max()


def test_it_reports_its_correlation_with_the_exact_grid_of_the_same_arguments(tiny_bos_model):
    experiment = Patching(tiny_bos_model, tokens_for(rows=2))
    exact = experiment.grid("mlp_out", values="zero")
    found = experiment.attribution("mlp_out", values="zero", exact=exact)
    pair = torch.stack([found.effect.flatten(), exact.effect.flatten()])
    assert found.correlation == pytest.approx(float(torch.corrcoef(pair)[0, 1]), abs=1e-5)
    assert experiment.attribution("mlp_out", values="zero").correlation is None
    with pytest.raises(ValueError, match="made with site 'mlp_out', not 'attn_out': give"):
        experiment.attribution("attn_out", values="zero", exact=exact)
    with pytest.raises(ValueError, match="made with other tokens"):
        Patching(tiny_bos_model, tokens_for(3, rows=2)).attribution("mlp_out", values="zero", exact=exact)
    shifted = dataclasses.replace(exact, clean=exact.clean + 1)
    with pytest.raises(ValueError, match="the exact grid's clean run has loss"):
        experiment.attribution("mlp_out", values="zero", exact=shifted)


def test_the_weights_and_hooks_are_left_as_they_were(tiny_bos_model):
    parameters = list(tiny_bos_model.parameters())
    before = [parameter.requires_grad for parameter in parameters]

    def stop(logits):
        if logits.abs().sum() > 0:  # the metric is first tried on zeros
            raise KeyboardInterrupt
        return logits.sum()

    experiment, options = (
        Patching(tiny_bos_model, tokens_for()),
        {"values": "zero", "over": ("layer", "head")},
    )
    with torch.inference_mode():
        usual = experiment.attribution("z", **options)
    with pytest.raises(KeyboardInterrupt):
        Patching(tiny_bos_model, tokens_for(), metric=stop).attribution("z", **options)
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        frozen = experiment.attribution("z", **options)
    finally:
        for parameter, was in zip(parameters, before, strict=True):
            parameter.requires_grad_(was)
    assert_close(usual.estimate, frozen.estimate)
    assert all(parameter.grad is None for parameter in parameters)
    assert not any(point.fwd_hooks for point in tiny_bos_model.hook_dict.values())


@pytest.mark.parametrize(
    ("site", "metric", "message"),
    [
        ("mlp_out", KL(), "smallest at the clean run, so its gradient there is zero"),
        ("mlp_out", lambda logits: logits.argmax().float(), "the metric is not differentiable"),
        ("attn_scores", None, "minus infinity, which has no first-order estimate"),
    ],
)
def test_what_has_no_gradient_is_refused(tiny_bos_model, site, metric, message):
    with pytest.raises(ValueError, match=message):
        Patching(tiny_bos_model, tokens_for(), metric=metric).attribution(site, values="zero")


def test_an_embedding_before_the_stream_needs_no_gradient(tiny_bos_model):
    experiment = Patching(tiny_bos_model, tokens_for())
    found = experiment.attribution("resid_post", values=NextEmbedding()).estimate
    expected = slope(experiment, "resid_post", values=NextEmbedding())
    assert (found - expected).abs().max() < 0.01 * expected.abs().max() + 2e-4


def test_it_is_marked_as_an_approximation_and_can_be_saved(tiny_bos_model, tmp_path):
    heads = [(layer, head) for layer in (0, 1) for head in (1, 3)]
    found = Patching(tiny_bos_model, tokens_for()).attribution(
        "z", values="zero", over=("layer", "head", "pos"), heads=heads
    )
    assert "approximation='first order'" in repr(found)
    assert AttributionPatchResult.load(found.save(tmp_path / "a.safetensors")) == found
    table = found.to_dataframe()
    row = table[(table.label == "L1H3") & (table.pos == 2)].iloc[0]
    assert row.effect == pytest.approx(float(found.effect[1, 1, 2]))
