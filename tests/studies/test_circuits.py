"""The studies of induction circuits: the chosen pair, and claims about it."""

from __future__ import annotations

import dataclasses

from mechlens.results import InductionCircuits
from mechlens.studies.circuits import CompositionStudy, study_composition
from mechlens.studies.published import COMPOSITION_GPT2


def test_the_article_is_compared_with_gpt2_only(bundled):
    found = study_composition(bundled, progress=False)
    assert found.comparisons == ()
    circuits = found.composition_circuits
    at = circuits.strongest
    assert circuits.verdicts[at] == "circuit"
    # the same circuits, as if they were GPT-2's
    published = circuits.evidence(at)["k_top1_keys"]
    figures = [dataclasses.replace(each, value=published + 0.004) for each in COMPOSITION_GPT2]
    keys, queries = found.holding_card(figures).comparisons
    assert keys.claim == "top-1 accuracy of the circuit of L1H2 and L3H5 over keys, for each query"
    assert keys.verdict == "reproduced"
    assert found.holding_card(COMPOSITION_GPT2).comparisons[0].verdict == "not reproduced"
    assert queries.measured == circuits.evidence(at)["k_top1_queries"]


def test_without_pairs_there_is_no_strongest(bundled):
    found = study_composition(bundled, progress=False)
    none = InductionCircuits(
        **vars(found.composition_circuits) | {"pairs": (), "verdicts": (), "reasons": ()}
    )
    assert none.strongest is None
    assert CompositionStudy((), none, found.composition).quantities() == {}
