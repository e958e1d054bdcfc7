"""When a claim counts as reproduced."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mechlens.results import Facts
from mechlens.studies.claims import MIN_DRAWS, Claim, Measured, Study
from mechlens.studies.published import Published
from tests import examples


def claim(published, measured, **options):
    """The comparison of a published and a measured value."""
    return Claim("share", published, "a card", lambda _: measured, **options).compare(Study(()))


@pytest.mark.parametrize(
    ("published", "measured", "verdict"),
    [
        ("L1H2", "L1H2", "reproduced"),
        ("L1H2", "L1H3", "not reproduced"),
        ("L1H2", 1.0, "not reproduced"),
        (20, 20, "reproduced"),
        (20, 21, "not reproduced"),
        (20, Measured(21, tolerance=1), "reproduced"),
        (0.70, Measured(0.72, tolerance=0.03), "reproduced"),
        (0.70, Measured(0.74, tolerance=0.03), "not reproduced"),
        (0.70, Measured(math.nan, tolerance=0.03), "not reproduced"),
        ("yes", Measured("yes", verdict="not judged"), "not judged"),
    ],
)
def test_names_and_numbers_must_agree(published, measured, verdict):
    assert claim(published, measured).verdict == verdict


def test_a_tolerance_is_formatted_like_its_number():
    assert claim(20, Measured(21, tolerance=1)).tolerance == "19 to 21"
    assert claim(0.70, Measured(0.74, tolerance=0.03)).tolerance == "0.6700 to 0.7300"


@pytest.mark.parametrize(
    ("bounds", "value", "verdict", "statement"),
    [
        ({"at_least": 0.5}, 0.5, "reproduced", "share, at least 0.50"),
        ({"at_least": 0.5}, 0.4, "not reproduced", "share, at least 0.50"),
        ({"at_most": 0.5}, 0.5, "reproduced", "share, at most 0.50"),
        ({"at_most": 0.5}, 0.6, "not reproduced", "share, at most 0.50"),
        ({"at_most": 0.5}, math.nan, "not judged", "share, at most 0.50"),
    ],
)
def test_a_threshold_decides_and_is_part_of_the_claim(bounds, value, verdict, statement):
    found = claim("small", value, **bounds)
    assert (found.verdict, found.claim) == (verdict, statement)


def test_a_mean_is_compared_with_means_of_equally_many_draws():
    samples = torch.tensor([-1.0, 1.0]).repeat(50)
    drawn = Measured(0.0, samples=samples)
    assert claim(0.0, drawn, draws=100).verdict == "reproduced"
    # 99% of such means are within 2.6 / sqrt(50)
    assert claim(0.5, drawn, draws=100).verdict == "not reproduced"
    few = dataclasses.replace(drawn, samples=samples[: MIN_DRAWS - 1])
    assert claim(0.0, few, draws=100).verdict == "not judged"


def test_a_card_is_compared_with_the_quantities_it_names():
    class Known(Study):
        def quantities(self):
            return {"answer": Measured(42, "the answer")}

    figures = [Published("answer", 42, "a card"), Published("question", 1.0, "a card")]
    found = Known(()).holding_card(figures).comparisons
    assert [(each.claim, each.measured, each.verdict) for each in found] == [
        ("the answer", 42, "reproduced"),
        ("question", "not measured", "not reproduced"),
    ]


def test_results_are_named_after_their_fields_and_keys():
    @dataclasses.dataclass(frozen=True)
    class Several(Study):
        one: Facts
        both: dict[str, Facts]
        number: int = 3

    facts = examples.facts()
    assert list(Several((), facts, {"a": facts, "b": facts}).results) == ["one", "both_a", "both_b"]
