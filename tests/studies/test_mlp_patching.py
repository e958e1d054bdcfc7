"""The claim about MLPs in "How one can Interpret GPT2-Small": known grids, and the bundled model."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mechlens.models.load.loading import load_model
from mechlens.studies.mlp_patching import CLAIMS, INDUCTION, MlpStudy, first_and_others, study_mlp_patching
from tests import examples
from tests.close import assert_close
from tests.reference import patching as reference
from tests.tiny_models import write_toy

SMALL_ELSEWHERE, FIRST_STANDS_OUT, FIRST_OF_COPY_STANDS_OUT = CLAIMS


@pytest.fixture(scope="module")
def study(bundled) -> MlpStudy:
    return study_mlp_patching(bundled, seq_len=8, batch=2)


def test_every_claim_is_measured(study):
    assert [each.claim for each in study.comparisons] == [claim.statement for claim in CLAIMS]
    assert {each.verdict for each in study.comparisons} <= {"reproduced", "not reproduced"}


def test_the_loop_as_written_starts_at_the_end_of_the_first_copy(bundled, study):
    tokens = study.mlps_as_written.tokens
    assert study.mlps_as_written.positions == tuple(range(8, 16))
    assert study.mlps_aligned.positions == tuple(range(9, 17))
    assert torch.equal(tokens, study.mlps_aligned.tokens)
    # the first position is the last token of the first copy, and gets BOS's output
    expected = reference.earlier(
        bundled, tokens[:1], "blocks.{}.hook_mlp_out", range(4), range(8, 16), 8, range(8, 16)
    )
    # float32 through four layers, in losses of a few nats
    assert torch.allclose(study.mlps_as_written.values[0], expected, atol=1e-4)


def test_without_bos_the_loop_as_written_is_aligned(bundled):
    found = study_mlp_patching(bundled, seq_len=4, batch=1, prepend_bos=False)
    assert found.mlps_as_written.positions == found.mlps_aligned.positions == (4, 5, 6, 7)
    assert_close(found.mlps_as_written.values, found.mlps_aligned.values)


def test_heads_are_scored_on_the_sequences_they_are_ablated_on(study):
    assert torch.equal(study.ablated_head_scores.tokens["repeated"][0], study.ablated_heads.tokens)


def test_the_largest_effects_at_the_first_position_and_elsewhere():
    # effects 1, 0.5, 0 | -0.5, 0, 0.25
    assert first_and_others(examples.patch_grid()) == (1.0, 0.5)


def test_claims_hold_or_fail_by_the_numbers(study):
    grid = examples.patch_grid()
    flat = dataclasses.replace(grid, values=torch.ones(1, 2, 3) + torch.tensor([0.05, 0.05, -0.05]))
    for aligned, small, is_small, stands_out, does_stand_out in (
        (grid, 0.5, "not reproduced", 2.0, "reproduced"),
        (flat, 0.05, "reproduced", 1.0, "not reproduced"),
    ):
        other = dataclasses.replace(study, mlps_aligned=aligned)
        found = SMALL_ELSEWHERE.compare(other)
        # float32 values of about 1, subtracted
        assert (found.measured, found.verdict) == (pytest.approx(small, abs=1e-6), is_small)
        found = FIRST_OF_COPY_STANDS_OUT.compare(other)
        assert (found.measured, found.verdict) == (pytest.approx(stands_out, abs=1e-5), does_stand_out)
    none = dataclasses.replace(grid, values=torch.ones(1, 2, 3))
    found = FIRST_STANDS_OUT.compare(dataclasses.replace(study, mlps_as_written=none))
    assert (math.isnan(found.measured), found.verdict) == (True, "not judged")


def test_rank_correlation_of_known_ranks():
    heads = examples.patch_grid(axes=("layer", "head"))
    study = MlpStudy((), heads, heads, heads, examples.head_scores())
    # scores .125 .25 .5 0 .875 (one head has none) against 1 .5 0 -.5 .25, ranks 1 2 3 0 4 and 4 3 1 0 2
    score, effect = torch.tensor([1.0, 2, 3, 0, 4]), torch.tensor([4.0, 3, 1, 0, 2])
    expected = 1 - 6 * float((score - effect).square().sum()) / (5 * 24)
    assert study.rank_correlation(INDUCTION) == pytest.approx(expected, abs=1e-12)


def test_a_model_without_mlps_is_refused(tmp_path):
    write_toy(tmp_path)
    with pytest.raises(ValueError, match="no MLPs"):
        study_mlp_patching(load_model(tmp_path), seq_len=4)
