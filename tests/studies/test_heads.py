"""What counts as reproduced, on results with known values."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from mechlens.models.load.loading import BUNDLED_DIRECTORY
from mechlens.models.protocol import describe
from mechlens.studies.heads import DRAWS, HeadsStudy, claim_of, study_heads
from mechlens.studies.published import GPT2_FIGURES, GPT2_SMALL, Published, figures_of, read_card
from mechlens.text.prompts import RepeatedTokens
from tests import examples


def compare(figure, performance, heads):
    return claim_of(figure).compare(HeadsStudy((), performance, heads, examples.attention()))


def spread_performance():
    """100 sequences of 3 tokens twice; the second half's mean log probability is 0, -0.01 .. -0.99."""
    base = examples.performance()
    log_prob = torch.full((1, 100, 7), torch.nan)
    log_prob[0, :, :3] = -5.0
    log_prob[0, :, 3:6] = -torch.arange(100.0)[:, None] / 100
    return dataclasses.replace(
        base,
        log_prob=log_prob,
        correct=torch.zeros(1, 100, 7, dtype=torch.bool),
        tokens=torch.zeros(1, 100, 7, dtype=torch.long),
    )


@pytest.mark.parametrize(
    ("value", "verdict"), [(-0.5, "reproduced"), (-0.98, "reproduced"), (-1.2, "not reproduced")]
)
def test_a_single_draw_is_compared_with_single_sequences(value, verdict):
    figure = Published("second_half_log_prob", value, "an article", sequences=1)
    found = compare(figure, spread_performance(), examples.head_scores())
    assert found.verdict == verdict
    # 99% of single sequences are between -0.99 and 0; the quantiles are from 20000 draws
    assert (found.low, found.high) == pytest.approx((-0.99, 0.0), abs=0.011)
    assert found.measured == pytest.approx(-0.495, abs=1e-6)


def test_a_mean_is_compared_with_means_of_equally_many():
    figure = Published("second_half_log_prob", -0.6, "an article", sequences=30)
    found = compare(figure, spread_performance(), examples.head_scores())
    # 1 / (1/30 + 1/100) = 23 sequences of standard deviation 0.2887: 2.576 * 0.2887 / sqrt(23)
    assert found.high - found.measured == pytest.approx(0.155, abs=0.012)
    assert found.verdict == "reproduced"
    assert (
        compare(dataclasses.replace(figure, value=-0.7), spread_performance(), examples.head_scores()).verdict
        == "not reproduced"
    )


def test_a_claim_about_the_first_copy_uses_the_first_copy():
    figure = Published("first_half_log_prob", -5.0, "an article")
    found = compare(figure, spread_performance(), examples.head_scores())
    assert found.measured == -5
    assert found.verdict == "reproduced"


def test_a_head_that_the_model_lacks_is_not_reproduced():
    figure = Published("score", 0.875, "an article", head=(1, 2), kind="induction_score", sequences=30)
    scores = examples.head_scores()
    many = {kind: values.repeat(15, 1, 1, 1) for kind, values in scores.scores.items()}
    scores = dataclasses.replace(
        scores, scores=many, nulls={}, tokens={"repeated": scores.tokens["repeated"].repeat(15, 1, 1)}
    )
    found = compare(figure, examples.performance(), scores)
    assert (found.claim, found.measured, found.verdict) == ("induction score of L1H2", 0.875, "reproduced")
    absent = dataclasses.replace(figure, head=(5, 5))
    found = compare(absent, examples.performance(), examples.head_scores())
    assert (found.measured, found.verdict) == ("no such head", "not reproduced")


def test_the_highest_head_and_the_heads_above_a_threshold():
    heads, performance = examples.head_scores(), examples.performance()
    highest = Published("highest_head", "L1H2", "an article", kind="induction_score")
    assert compare(highest, performance, heads).verdict == "reproduced"
    assert compare(dataclasses.replace(highest, value="L0H2"), performance, heads).verdict == "not reproduced"
    above = Published("heads_above", "L0H2 L1H2", "an article", kind="induction_score", threshold=0.4)
    found = compare(above, performance, heads)
    assert (found.measured, found.verdict) == ("L0H2 L1H2", "reproduced")
    fewer = compare(dataclasses.replace(above, threshold=0.6), performance, heads)
    assert (fewer.measured, fewer.verdict) == ("L1H2", "not reproduced")
    none = compare(dataclasses.replace(above, threshold=0.99), performance, heads)
    assert none.measured == "none"


def circuit_scores(previous: tuple[int, int], induction: tuple[int, int], *, null: float = 0.02):
    scores = {kind: torch.zeros(1, 2, 2, 3) for kind in ("induction_score", "previous_token_score")}
    scores["previous_token_score"][:, :, previous[0], previous[1]] = 0.95
    scores["induction_score"][:, :, induction[0], induction[1]] = 0.85
    nulls = {kind: torch.full((1, 2, 2, 3), null) for kind in scores}
    return dataclasses.replace(examples.head_scores(), scores=scores, nulls=nulls)


@pytest.mark.parametrize(
    ("previous", "induction", "null", "holds"),
    [
        ((0, 1), (1, 2), 0.02, True),
        ((1, 1), (1, 2), 0.02, False),  # not in an earlier layer
        ((1, 1), (0, 2), 0.02, False),
        ((0, 1), (1, 2), 0.2, False),  # its null is a quarter of it, so it may attend at a fixed distance
    ],
)
def test_an_induction_circuit_needs_the_right_order_and_clear_nulls(previous, induction, null, holds):
    figure = Published("induction_circuit", "yes", "a card")
    heads = circuit_scores(previous, induction, null=null)
    found = compare(figure, examples.performance(), heads)
    assert found.verdict == ("reproduced" if holds else "not reproduced")
    assert found.measured == ("L1H2 0.850 after L0H1 0.950" if holds else "none")


def test_a_threshold_is_a_lower_or_an_upper_bound():
    figure = Published("at_least", "at least 0.90", "a card", kind="second_half_accuracy", threshold=0.9)
    found = compare(figure, examples.performance(), examples.head_scores())
    assert found.verdict == "not reproduced"
    assert found.claim == "top-1 accuracy on the second copy, at least 0.90"
    low = dataclasses.replace(figure, threshold=0.7)
    assert compare(low, examples.performance(), examples.head_scores()).verdict == "reproduced"
    most = dataclasses.replace(figure, what="at_most", threshold=0.8)
    assert compare(most, examples.performance(), examples.head_scores()).verdict == "reproduced"
    least = dataclasses.replace(most, threshold=0.7)
    assert compare(least, examples.performance(), examples.head_scores()).verdict == "not reproduced"


def test_only_models_with_published_figures_are_compared():
    sizes = {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_vocab": 50257}
    gpt2 = dataclasses.replace(examples.model("gpt2"), **sizes)
    for name in GPT2_SMALL:
        assert figures_of(dataclasses.replace(gpt2, name=name)) == GPT2_FIGURES
    assert figures_of(dataclasses.replace(gpt2, name="EleutherAI/pythia-160m")) == ()
    assert figures_of(examples.model("gpt2")) == (), "another model in a folder of that name"
    assert figures_of(dataclasses.replace(gpt2, revision="main~1")) == ()


def test_the_card_was_measured_on_other_seeds_than_the_default_ones():
    card = json.loads((BUNDLED_DIRECTORY / "card.json").read_text())
    assert not set(card["seeds"]) & {*RepeatedTokens().seeds, *DRAWS.seeds}


def test_too_few_sequences_give_no_verdict():
    figure = Published("second_half_log_prob", -0.5, "an article")
    found = compare(figure, examples.performance(), examples.head_scores())
    assert (found.verdict, found.low, found.high) == ("not judged", None, None)


def test_a_card_is_read_and_a_damaged_one_refused(tmp_path):
    path = tmp_path / "card.json"
    assert read_card(path) == ()
    figure = Published("score", 0.9, "a card", head=(1, 2), kind="induction_score", sequences=30)
    path.write_text(json.dumps({"figures": [dataclasses.asdict(figure)]}))
    assert read_card(path) == (figure,)
    path.write_text(json.dumps({"figures": [{"nonsense": 1}]}))
    with pytest.raises(ValueError, match="is not a model card"):
        read_card(path)


def test_a_kind_that_was_not_scored_is_not_judged():
    figure = Published("highest_head", "L1H2", "an article", kind="prefix_matching_score")
    heads = examples.head_scores()
    scores = {kind: values for kind, values in heads.scores.items() if kind != figure.kind}
    found = compare(figure, examples.performance(), dataclasses.replace(heads, scores=scores, nulls={}))
    assert (found.measured, found.verdict) == ("does not fit the model's context", "not judged")


def test_the_bundled_model_agrees_with_its_card(bundled):
    figures = [each for each in figures_of(describe(bundled)) if each.study == "heads"]
    found = study_heads(bundled, RepeatedTokens(50, 30, seeds=[11]), figures=figures)
    assert [each.verdict for each in found.comparisons] == ["reproduced"] * len(figures)
    assert len(figures) >= 8
    shorter = study_heads(bundled, RepeatedTokens(20, 2, seeds=[0]), figures=figures)
    assert shorter.comparisons == (), "nothing is published for 20 tokens"
