"""The claims of nostalgebraist's logit-lens post: known cases, and the bundled model in full."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

from mechlens.studies.logit_lens import CLAIMS, LensStudy, depth_of_entry, rare_words, study_logit_lens

NAMES = (
    "final_guess_enters",
    "kl_falls",
    "largest_fall",
    "input_is_apart",
    "rare_copy_enters",
    "repetition_noticed",
    "rare_inputs_kept",
)
BY_NAME = dict(zip(NAMES, CLAIMS, strict=True))


def compare(claim, study):
    return claim.compare(study)


@pytest.fixture(scope="module")
def study(bundled) -> LensStudy:
    return study_logit_lens(bundled, n_rare=6)


def number(measured) -> float:
    return measured if isinstance(measured, float) else float(re.match(r"-?[\d.]+", measured)[0])


def test_every_claim_is_measured(study):
    assert [each.claim for each in study.comparisons] == [claim.statement for claim in CLAIMS]
    assert {each.verdict for each in study.comparisons} == {"reproduced", "not reproduced"}
    assert all(math.isfinite(number(each.measured)) for each in study.comparisons)


def test_depth_of_entry_of_a_known_token():
    # rows embed, 0, 1, 2, 3; three tokens: in the top 2 after layer 1, never, from the start
    rank = torch.tensor([[1, 9, 1], [5, 9, 2], [2, 9, 7], [1, 9, 1], [1, 3, 1]]).float()
    depth = depth_of_entry(rank, top=2)
    assert depth[:1].tolist() + depth[2:].tolist() == [0.5, 0.25]
    assert math.isnan(depth[1])


def test_entry_and_kl_on_prose_match_full_distributions(bundled, study):
    prose = study.prose
    depths, kls = [], []
    for row, real in zip(prose.tokens, prose.mask, strict=True):
        with torch.no_grad():
            _, cache = bundled.run_with_cache(row[real][None])
        residuals = [cache["blocks.0.hook_resid_pre"]]
        residuals += [cache[f"blocks.{layer}.hook_resid_post"] for layer in range(4)]
        with torch.no_grad():
            logits = torch.stack(
                [(bundled.ln_final(r) @ bundled.W_U + bundled.b_U)[0].double() for r in residuals]
            )
        log_probs = logits.log_softmax(-1)
        for pos in range(1, logits.shape[1]):
            own = log_probs[-1, pos]
            kls.append([float((own.exp() * (own - log_probs[r, pos])).sum()) for r in range(5)])
            final = int(own.argmax())
            for layer in range(4):
                if final in log_probs[1 + layer, pos].topk(10).indices:
                    depths.append((layer + 1) / 4)
                    break
    found = {name: number(each.measured) for name, each in zip(NAMES, study.comparisons, strict=True)}
    # printed with 3 decimals
    assert found["final_guess_enters"] == pytest.approx(sum(depths) / len(depths), abs=6e-4)
    means = torch.tensor(kls).mean(0)
    assert found["input_is_apart"] == pytest.approx(float(means[0] / means[1:].max()), abs=2e-3)
    falls = means[1:-1] - means[2:]
    assert found["kl_falls"] == pytest.approx(float((falls > 0).float().mean()), abs=6e-4)
    assert found["largest_fall"] == pytest.approx(float(falls.max() / (means[1] - means[-1])), abs=2e-3)


def test_copies_are_read_at_the_position_that_predicts_the_second(study):
    copying = study.copying
    for row in range(len(copying.tokens)):
        ids = copying.tokens[row][copying.mask[row]].tolist()
        assert ids.count(ids[-1]) == 2
    measured = next(c for c in study.comparisons if "copied" in c.claim)
    # the bundled model's induction heads are in its last layer
    assert number(measured.measured) == 1.0


def lens_with(study, **changes) -> LensStudy:
    return dataclasses.replace(study, **changes)


def test_a_model_that_does_not_copy_or_notice_is_not_judged(study):
    copying, repetition = study.copying, study.repetition
    blind = {"next": torch.full_like(copying.rank["next"], 50.0)}
    without = lens_with(study, copying=dataclasses.replace(copying, rank={**copying.rank, **blind}))
    assert compare(BY_NAME["rare_copy_enters"], without).verdict == "not judged"
    even = {"next": torch.full_like(repetition.log_prob["next"], -3.0)}
    without = lens_with(
        study, repetition=dataclasses.replace(repetition, log_prob={**repetition.log_prob, **even})
    )
    assert compare(BY_NAME["repetition_noticed"], without).verdict == "not judged"


def test_claims_fail_if_the_opposite_is_measured(study):
    prose, copying = study.prose, study.copying
    late = {
        "final": torch.where(torch.arange(5)[:, None, None] == 4, 1.0, 50.0).expand_as(prose.rank["final"])
    }
    worse = lens_with(study, prose=dataclasses.replace(prose, rank={**prose.rank, **late}))
    found = compare(BY_NAME["final_guess_enters"], worse)
    assert (found.verdict, number(found.measured)) == ("not reproduced", 1.0)
    early = {"next": torch.ones_like(copying.rank["next"])}
    worse = lens_with(study, copying=dataclasses.replace(copying, rank={**copying.rank, **early}))
    found = compare(BY_NAME["rare_copy_enters"], worse)
    assert (found.verdict, number(found.measured)) == ("not reproduced", 0.25)
    # one layer makes the whole jump, and the embedding is no further away than the layers
    kl = torch.tensor([4.0, 4.0, 4.0, 0.0, 0.0])[:, None, None].expand_as(prose.kl_final)
    worse = lens_with(study, prose=dataclasses.replace(prose, kl_final=kl))
    assert compare(BY_NAME["kl_falls"], worse).measured == pytest.approx(1 / 3)
    assert compare(BY_NAME["largest_fall"], worse).measured == 1.0
    assert compare(BY_NAME["input_is_apart"], worse).verdict == "not reproduced"


def test_rare_inputs_are_those_with_high_ids(study):
    prose = study.prose
    for better, verdict in ((True, "reproduced"), (False, "not reproduced")):
        middle = prose.tokens[prose.mask].median()
        rare = torch.where(prose.tokens > middle, 10.0, 1000.0)
        rank = {"input": (rare if better else 1e4 / rare).expand_as(prose.rank["input"])}
        other = lens_with(study, prose=dataclasses.replace(prose, rank={**prose.rank, **rank}))
        assert compare(BY_NAME["rare_inputs_kept"], other).verdict == verdict


def test_rare_words_are_single_late_tokens(bundled):
    words = rare_words(bundled, 8, seed=1)
    ids = [bundled.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    assert all(len(each) == 1 and each[0] > 0.75 * 2048 for each in ids)
    assert len(set(words)) == 8
    assert words == rare_words(bundled, 8, seed=1) != rare_words(bundled, 8, seed=2)
    for options, message in (
        ({"count": 0}, "n_rare must be at least 1"),
        ({"count": 5000}, "n_rare must be at most .* rare one-token words of this model, got 5000"),
    ):
        with pytest.raises(ValueError, match=message):
            rare_words(bundled, **options, seed=0)
